"""`vllm serve` where vLLM's own command does not start: `python -m reap_serve.serve.cpu_serve serve MODEL [options]`.

`python -m vllm.entrypoints.openai.api_server` starts there, but passes over --api-server-count and --headless.
"""

from reap_serve.adapter.commands import run_serve_command

# API servers are spawned: their processes import this module, too.
if __name__ == "__main__":
    run_serve_command()
