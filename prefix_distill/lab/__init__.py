"""The built-in tasks: three small tasks with models that ship inside the package."""
