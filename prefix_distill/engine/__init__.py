"""Models at work on this machine: loading, sampling, alignment, scoring, evaluation."""
