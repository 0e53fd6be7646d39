"""The embedded laboratory: three small tasks with models that ship inside the package."""
