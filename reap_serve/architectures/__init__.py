"""One JSON per model family: names of tensors, keys of the configuration, limits of the router."""
