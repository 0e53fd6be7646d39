"""The mathematics: divergences, weights, schedules, FLOPs, intervals.

The only third-party import is torch.
"""
