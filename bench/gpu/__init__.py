"""What needs a GPU: `make gpu-check`, or `python -m bench.gpu` where a packed vLLM is on PYTHONPATH."""
