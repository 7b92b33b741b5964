"""Recorded requests in any format to requests with a slice. Imports neither torch nor vLLM."""
