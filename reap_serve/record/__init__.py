"""Steps and their rows to sums per slice, phase, layer and expert."""
