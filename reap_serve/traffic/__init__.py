"""Recorded requests in any format, as a stream of requests with a slice."""
