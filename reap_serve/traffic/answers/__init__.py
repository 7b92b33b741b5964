"""Recorded answers, put together from whatever a log holds of them."""
