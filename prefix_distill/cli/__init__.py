"""Commands: parse, build, call one function, print, exit. Only this folder writes to stdout or
exits."""
