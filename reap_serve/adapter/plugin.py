"""Entry point of `vllm.general_plugins`: vLLM calls `register` in every process, before a model is built."""

from __future__ import annotations


def register() -> None:
    """Installs the seams, or their refusal. Both do nothing in engines whose configuration lacks `reap_serve`."""
    from reap_serve.adapter import seams

    problems = seams.seam_problems()
    if problems:
        seams.install_refusal(problems)
        return
    from reap_serve.adapter import engine

    seams.install(engine.HOOKS)
