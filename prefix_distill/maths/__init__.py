"""The mathematics: divergences, token weights, schedules, FLOPs, intervals.

The only third-party import is torch.
"""
