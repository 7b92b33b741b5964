"""REAP expert pruning where the traffic is: observe in vLLM, plan, prune, verify, compare."""

__version__ = "0.2.0"
