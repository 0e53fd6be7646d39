"""The public Python API, and the functions that the commands call. `public` lists its names."""
