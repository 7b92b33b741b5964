"""Engines of the check: in this process, with observation or without, in the graph modes that vLLM has."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

WORKER = "reap_serve.adapter.worker.ReapWorkerExtension"
# (mode of compilation, mode of graphs); None keeps vLLM's default.
GRAPHS: dict[str, dict[str, Any] | None] = {
    "eager": {"mode": 0, "cudagraph_mode": "NONE"},
    "full": {"mode": 0, "cudagraph_mode": "FULL"},
    "full_decode_only": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "piecewise": {"cudagraph_mode": "PIECEWISE"},
    "default": None,
}
# What a CPU can show of graphs: everything is made as for them, and every step runs in Python.
PRETENDED, PRETENDED_ROWS = "pretended", 16
# Fewer than vLLM's: each takes its time.
CAPTURED_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def start(
    model: Path,
    graphs: str,
    settings: dict[str, Any] | None,
    *,
    second_runner: bool | None = None,
    **arguments: Any,
) -> Any:
    """An engine.

    Args:
        model: Its directory.
        graphs: Name of a mode of `GRAPHS`, or `PRETENDED`.
        settings: `ObserveSettings`, None for a plain engine.
        second_runner: Which of vLLM's model runners; None leaves it to vLLM.
        arguments: Further arguments of `vllm.LLM`.
    """
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if second_runner is not None:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(second_runner))
    from vllm import LLM
    from vllm.platforms import current_platform

    from reap_serve.adapter.plugin import register

    # Also where the project is on the path and not installed, so that vLLM finds no plugin.
    register()
    chosen: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
        "dtype": "bfloat16",
        "disable_log_stats": True,
    }
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        chosen["enforce_eager"] = True
    else:
        chosen |= {"gpu_memory_utilization": 0.2}
        if importlib.util.find_spec("vllm.vllm_flash_attn._vllm_fa2_C") is None or _packed():
            chosen["attention_backend"] = "TRITON_ATTN"
        mode = GRAPHS[graphs]
        if graphs == "eager":
            chosen["enforce_eager"] = True
        elif mode is not None:
            chosen["compilation_config"] = mode | {"cudagraph_capture_sizes": CAPTURED_ROWS}
    if settings is not None:
        chosen |= {"additional_config": {"reap_serve": settings}, "worker_extension_cls": WORKER}
    with _pretended() if graphs == PRETENDED else contextlib.nullcontext():
        return LLM(**(chosen | arguments))


@contextlib.contextmanager
def _pretended() -> Iterator[None]:
    """An engine that is started in this context takes its steps for replays, up to `PRETENDED_ROWS` rows."""
    from reap_serve.adapter import engine_view
    from reap_serve.record.captured_rows import Graphs

    graphs = Graphs(PRETENDED_ROWS, lambda: False)
    with (
        mock.patch.object(engine_view, "captures_graphs", return_value=True),
        mock.patch.object(engine_view, "graphs", return_value=graphs),
    ):
        yield


def _packed() -> bool:
    """A packed vLLM has an empty Python file where FlashAttention's extension was."""
    found = importlib.util.find_spec("vllm.vllm_flash_attn._vllm_fa2_C")
    return found is not None and str(found.origin).endswith(".py")


def stop(llm: Any) -> None:
    """Stops an engine and gives its memory back."""
    import gc

    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def prompts(count: int, length: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random prompts of different lengths around `length`."""
    import numpy as np

    from bench.gpu.models import VOCABULARY

    random = np.random.default_rng(seed)
    sizes = random.integers(max(1, length // 2), length + length // 2, size=count)
    return [{"prompt_token_ids": random.integers(0, VOCABULARY, size=int(size)).tolist()} for size in sizes]
