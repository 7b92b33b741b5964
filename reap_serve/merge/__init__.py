"""Merging baselines: statistics and checkpoint to a checkpoint of the pruned one's size, to lose fairly against it."""
