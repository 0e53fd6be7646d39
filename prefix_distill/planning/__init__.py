"""Before a run: checks, memory forecast, plan, probe."""
