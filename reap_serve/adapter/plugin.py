"""Entry point of `vllm.general_plugins`: vLLM calls `register` in every process, before a model is built."""

from __future__ import annotations


def register() -> None:
    """Installs the seams. They do nothing in engines whose additional configuration lacks `reap_serve`."""
    from reap_serve.adapter import engine, seams

    if not seams.seam_problems():
        seams.install(engine.HOOKS)
