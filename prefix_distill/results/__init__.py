"""After runs: evaluation, comparison, report, export."""
