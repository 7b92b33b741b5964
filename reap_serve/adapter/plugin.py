"""Entry point of `vllm.general_plugins`: vLLM calls `register` in every process, before a model is built.

The root of an engine process, and so the one file of this package that knows of a later stage.
"""

from __future__ import annotations


def register() -> None:
    """Installs the seams, or their refusal. Both do nothing in engines whose configuration lacks `reap_serve`."""
    from reap_serve.adapter import fit
    from reap_serve.adapter.parent import end_with_parent

    end_with_parent()
    problems = fit.fit_problems()
    if problems:
        fit.install_refusal(problems)
        return
    from reap_serve.adapter.modular_only import answer_for_monolithic
    from reap_serve.adapter.seams import install
    from reap_serve.serve.engine import model_loaded

    install(model_loaded)
    answer_for_monolithic()
