"""Whether the installed vLLM is one that this release knows (`releases`), and the refusal where it is not."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reap_serve.adapter.releases.check import RELEASES, installed_problems
from reap_serve.errors import EngineError
from reap_serve.record.settings import CONFIG_KEY, ObserveSettings
from reap_serve.shown_text import shown_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Classes that load a model, one of them on every platform.
LOADERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
)

logger = shown_logger("reap_serve")


def fit_problems() -> list[str]:
    """What of the names in the installed vLLM's table is not as the table says; empty when all is well."""
    return list(installed_problems())


def require_fit() -> None:
    """Refuses a vLLM that this release does not fit.

    Raises:
        EngineError: Names everything that differs.
    """
    problems = fit_problems()
    if problems:
        raise _misfit(problems)


def _misfit(problems: Sequence[str]) -> EngineError:
    return EngineError("vLLM does not fit: " + "; ".join(problems), f"install vLLM {' or '.join(RELEASES)}")


def settings_of(vllm_config: VllmConfig) -> ObserveSettings | None:
    """The settings in the engine's additional configuration, None when it has none."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping) or CONFIG_KEY not in additional:
        return None
    return ObserveSettings.model_validate(additional[CONFIG_KEY])


def install_refusal(problems: Sequence[str]) -> None:
    """In a vLLM that does not fit: refuses the engines that ask for observation, and leaves all others alone.

    Args:
        problems: What does not fit, of which the seam itself may be a part.
    """
    refusing = 0
    for module_name, class_name in LOADERS:
        try:
            runner_class = getattr(importlib.import_module(module_name), class_name)
            _wrap_refusal(runner_class, runner_class.load_model, problems)
        except Exception:  # noqa: BLE001 - whatever an unknown vLLM does, engines that ask for nothing must run
            continue
        refusing += 1
    if not refusing:
        logger.error("nothing is observed: vLLM does not fit: %s", "; ".join(problems))


def _wrap_refusal(runner_class: Any, load_model: Callable[..., None], problems: Sequence[str]) -> None:
    @functools.wraps(load_model)
    def refused_load(self: Any, *args: Any, **kwargs: Any) -> None:
        if settings_of(self.vllm_config) is not None:
            raise _misfit(problems)
        load_model(self, *args, **kwargs)

    runner_class.load_model = refused_load
