"""The training run: preparation, the loop, one step, checkpoints, the run folder."""
