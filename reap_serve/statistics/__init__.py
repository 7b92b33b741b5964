"""Sums per slice, phase, layer and expert: on disk, merged, shown, turned into saliency."""
