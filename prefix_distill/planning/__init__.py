"""Before anything is spent: checks, memory forecast, plan, probe."""
