"""Statistics and limits to which experts stay. Imports neither torch nor vLLM."""
