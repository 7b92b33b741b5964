"""What observation reads of a running engine: its layers, their kernels, its configuration.

What is put into vLLM stands in `seams`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from reap_serve.adapter.kernel_class import adds_rows_apart, columns_of
from reap_serve.adapter.operators import StandIn
from reap_serve.adapter.releases.check import vllm_version
from reap_serve.record.captured_rows import Graphs
from reap_serve.record.recorder import LayerFacts
from reap_serve.records import JsonValue
from reap_serve.traffic.refusal import RefusedRecordError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

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


def kernel_name(layer: MoERunner) -> str:
    """Class of the kernel that runs a layer's experts, with its instruction set on a CPU."""
    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = layer.routed_experts.quant_method if kernel is None else kernel.fused_experts
    on_cpu = cpu_kernel(layer)
    return type(experts).__name__ + (f" ({on_cpu.isa})" if on_cpu is not None else "")


def reducing_kernel(layer: MoERunner) -> object | None:
    """The kernel of a layer that adds weighted rows in its method `moe_sum`, None when it adds them elsewhere."""
    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    return cast(object, experts) if experts is not None and adds_rows_apart(type(experts)) else None


def opaque_forward(layer: MoERunner) -> Callable[..., Any]:
    """vLLM's operator that runs a layer's Python at every step, whatever was compiled."""
    entries = torch.ops.vllm
    return cast(
        Callable[..., Any], entries.moe_forward if layer._shared_experts is None else entries.moe_forward_shared
    )


def cpu_kernel(layer: MoERunner) -> Any:
    """The kernel object of a layer that runs `cpu_fused_moe`, None when another kernel runs it."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if isinstance(experts, CPUUnquantizedExperts) and not experts._use_zentorch:
        return experts
    return None


def cpu_kernel_stand_in(call: Callable[..., None]) -> StandIn:
    """What may stand in for the operator of that kernel.

    Args:
        call: Takes output, input, w13, w2, their biases, weights, ids, whether the weights were applied on the input,
            activation and instruction set.
    """
    return StandIn(torch.ops._C, "cpu_fused_moe", call)


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


def moe_layers(vllm_config: VllmConfig, model: torch.nn.Module | None = None) -> list[MoERunner]:
    """The fused MoE layers of this process, in the order of the model.

    Args:
        vllm_config: The engine's.
        model: Leaves out what is no part of it: the layers of a draft model. None leaves out none.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    context = vllm_config.compilation_config.static_forward_context
    own = None if model is None else {id(module) for module in model.modules()}
    return [layer for layer in context.values() if isinstance(layer, MoERunner) and (own is None or id(layer) in own)]


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


def routes_in_model(layer: MoERunner) -> bool:
    """Whether the Transformers model routes by itself, so that what vLLM calls logits are none.

    Either it hands over the weights that it chose, by a layer class of its own, or its router is called from within a
    custom routing function, which gets the hidden states in the logits' place.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner

    if isinstance(layer, TransformersMoERunner):
        return True
    if not isinstance(layer.router, (CPURouter, CustomRoutingRouter)):
        return False
    function = layer.router.custom_routing_function
    while isinstance(function, functools.partial):
        function = function.func
    return function is not None and function.__module__ == TransformersMoERunner.__module__


def current_layer(name: str) -> MoERunner:
    """The layer of that name in the model whose forward pass is running."""
    return cast("MoERunner", _forward_context()().no_compile_layers[name])


# Every layer asks at every step: an import statement takes longer than the call.
@functools.cache
def _forward_context() -> Callable[[], Any]:
    from vllm.forward_context import get_forward_context

    return cast(Callable[[], Any], get_forward_context)


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that it does not take."""
    from vllm.exceptions import VLLMClientError

    return ValueError, VLLMClientError


class EngineRenderer:
    """Renders requests as vLLM's own chat endpoint would: template, tools and template arguments of the body.

    Args:
        llm: The engine.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        """Tokens of a chat request; see `traffic.teacher_forcing.Renderer`."""
        messages = [*cast(Sequence[Any], body["messages"]), *([dict(answer)] if answer is not None else [])]
        try:
            rendered = self._llm._preprocess_chat_one(
                messages,
                chat_template=body.get("chat_template"),
                chat_template_kwargs=body.get("chat_template_kwargs"),
                tools=body.get("tools"),
                add_generation_prompt=answer is None,
            )
        except refusals() as error:
            raise RefusedRecordError(str(error)) from error
        return list(rendered["prompt_token_ids"])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text."""
        return list(self._llm.get_tokenizer().encode(text, add_special_tokens=special)) if text else []


def run_overlapped_shared_experts(shared_experts: Any, shared_experts_input: torch.Tensor | None) -> None:
    """Runs the shared experts where the plain kernel would have run them inside itself; else does nothing."""
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

    if shared_experts is not None:
        shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)


def layer_facts(layer: MoERunner) -> LayerFacts:
    """What a recorder needs of a layer whose weights are in place."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    experts, config = layer.routed_experts, layer.moe_config

    def forward_experts(x_NH: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # Not `experts.forward_modular`: that is tapped.
        with columns_of(experts.quant_method.moe_kernel, ids.shape[1]):
            return cast(
                torch.Tensor,
                experts.quant_method.apply(
                    layer=experts,
                    x=x_NH,
                    topk_weights=weights,
                    topk_ids=ids,
                    shared_experts=None,
                    shared_experts_input=None,
                ),
            )

    # The kernel of data-parallel ranks returns to each the complete rows of its own tokens.
    together = config.dp_size > 1
    expert_map_E = None if together else experts.expert_map
    return LayerFacts(
        name=layer.layer_name,
        index=layer.layer_id,
        num_experts=config.num_logical_experts,
        top_k=config.experts_per_token,
        gate_scale=layer.routed_scaling_factor,
        weight_on_input=experts.apply_router_weight_on_input,
        forward_experts=forward_experts,
        complete_rows=tensor_model_parallel_all_reduce if config.tp_size > 1 and not together else None,
        expert_map_E=expert_map_E,
        complete_sizes=None if expert_map_E is None else tensor_model_parallel_all_reduce,
        replica_of=functools.partial(_first_replicas, layer) if moves_experts(layer) else None,
    )


def moves_experts(layer: MoERunner) -> bool:
    """Whether EPLB serves the layer's experts by replicas and moves them."""
    return bool(layer.moe_config.moe_parallel_config.enable_eplb)


def _first_replicas(layer: MoERunner, expert_ids: torch.Tensor) -> torch.Tensor:
    """A replica of each expert, as they stand now."""
    replicas_ER = layer.router.eplb_state.logical_to_physical_map
    return cast(torch.Tensor, replicas_ER[expert_ids.clamp(min=0).long(), 0].to(expert_ids.dtype))


def logical_ids(layer: MoERunner, replica_ids: torch.Tensor) -> torch.Tensor:
    """Ids of the experts whose replicas were chosen in the running forward pass."""
    replicas_ER = layer.router.eplb_state.logical_to_physical_map
    experts_ER = torch.arange(replicas_ER.shape[0], device=replicas_ER.device).unsqueeze(1).expand_as(replicas_ER)
    # Missing replicas are -1: they write behind the last one.
    num_replicas = layer.moe_config.num_experts
    expert_of = torch.full((num_replicas + 1,), -1, dtype=replica_ids.dtype, device=replica_ids.device)
    index = torch.where(replicas_ER < 0, num_replicas, replicas_ER)
    expert_of.scatter_(0, index.reshape(-1).long(), experts_ER.reshape(-1).to(expert_of.dtype))
    return torch.where(replica_ids < 0, -1, expert_of[replica_ids.clamp(min=0).long()])
