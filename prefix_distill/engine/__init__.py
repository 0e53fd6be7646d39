"""Run models on this machine: load, sample, align, score, evaluate."""
