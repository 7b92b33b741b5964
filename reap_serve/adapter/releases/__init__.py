"""The releases of vLLM that this one knows: a table of names each, and its differences from its neighbour."""
