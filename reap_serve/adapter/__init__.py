"""Inside vLLM: routed tokens to sums per slice, phase, layer and expert. Alone in importing vLLM's internals."""
