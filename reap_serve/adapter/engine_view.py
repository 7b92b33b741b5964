"""What is read of a running engine: its configuration and the machine (`layer_view`: its layers)."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from reap_serve.adapter.releases.check import vllm_version
from reap_serve.record.captured_rows import Graphs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# cpu_utils::ScratchPadManager::get_scratchpad_manager()
SCRATCHPAD_SYMBOL = "_ZN9cpu_utils17ScratchPadManager22get_scratchpad_managerEv"


def max_rows(vllm_config: VllmConfig) -> int:
    """Rows of the largest step of an engine, with the padding of CUDA graphs."""
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return int(max(vllm_config.scheduler_config.max_num_batched_tokens, largest_graph))


def captures_graphs(vllm_config: VllmConfig) -> bool:
    """Whether steps are replayed from captured CUDA graphs, in which no Python runs.

    A mode that vLLM has not settled (None) may become one with graphs, so it counts as one.
    """
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE


def graphs(vllm_config: VllmConfig) -> Graphs | None:
    """The graphs that steps will be replayed from, None where none are."""
    if not captures_graphs(vllm_config):
        return None
    return Graphs(largest=max_graph_rows(vllm_config), capturing=torch.cuda.is_current_stream_capturing)


def max_graph_rows(vllm_config: VllmConfig) -> int:
    """Rows of the largest captured graph."""
    return int(vllm_config.compilation_config.max_cudagraph_capture_size or max_rows(vllm_config))


def agreement(vllm_config: VllmConfig) -> Callable[[float], float] | None:
    """Gives every rank of an engine the value of the first one; None where there is one rank.

    All ranks have to call it in the same step. Data-parallel ranks run steps of their own: each is an engine here.
    """
    from vllm.distributed.parallel_state import get_tp_group, get_world_group

    ranks = get_world_group() if vllm_config.parallel_config.data_parallel_size == 1 else get_tp_group()
    if ranks.world_size == 1:
        return None

    def agree(value: float) -> float:
        held = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(held, src=ranks.ranks[0], group=ranks.cpu_group)
        return float(held)

    return agree


def traces_graphs(vllm_config: VllmConfig) -> bool:
    """Whether the engine compiles its model: what is not in the graph then, is not run."""
    from vllm.config import CompilationMode

    return bool(vllm_config.compilation_config.mode != CompilationMode.NONE)


def device_type() -> str:
    """Where vLLM computes on this machine."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def truncates_to_bfloat16() -> bool:
    """Whether vLLM's kernels cut float32 off to bfloat16 here instead of rounding it.

    On x86 vLLM chooses its build by the same tests; only that with AVX512-BF16 rounds (`csrc/cpu/cpu_types_x86.hpp`).
    """
    if device_type() != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported())


def scratchpad_address() -> int | None:
    """Where the object that manages the CPU kernels' scratch memory is, None when the extension does not tell."""
    import vllm

    for library in sorted(Path(vllm.__file__).parent.glob("_C*.so")):
        try:
            # One of several builds is loaded, the one for this machine.
            find = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD)[SCRATCHPAD_SYMBOL]
        except (OSError, AttributeError):
            continue
        find.restype = ctypes.c_void_p
        return cast(int | None, find())
    return None


def tensor_parallel_rank() -> int:
    """Rank of this process among those that share the experts."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def engine_number(vllm_config: VllmConfig) -> int:
    """Which of the data-parallel engines behind one server this process belongs to, from 0."""
    return int(vllm_config.parallel_config.data_parallel_rank)


def model_reference(vllm_config: VllmConfig) -> str:
    """The served model as `open_model` takes it."""
    model = vllm_config.model_config
    return model.model if model.revision is None else f"{model.model}@{model.revision}"


def engine_header(vllm_config: VllmConfig) -> dict[str, str]:
    """What ran the model, for the header of its statistics."""
    return {
        "vllm": vllm_version() or "",
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "device": str(vllm_config.device_config.device_type),
    }
