"""The paper's comparison, pruning against merging, on the embedded model."""
