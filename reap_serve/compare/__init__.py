"""Base and candidate on the same traffic: quality, latency, memory; one report."""
