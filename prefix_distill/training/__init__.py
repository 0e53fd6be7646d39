"""The training run: preparation, the loop, one update, checkpoints, the run folder."""
