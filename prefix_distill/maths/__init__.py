"""The mathematics: divergences, weights, schedules, FLOPs, intervals. Imports torch at most."""
