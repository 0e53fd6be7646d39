"""The commands: each parses its flags, builds a config, calls one function and prints the result.

Only this package writes to stdout or exits.
"""
