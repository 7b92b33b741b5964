"""What is read of the fused MoE layers of an engine and of their kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from reap_serve.adapter.kernel_class import adds_rows_apart, columns_of, finalized
from reap_serve.adapter.replicas import first_replicas, moves_experts
from reap_serve.record.recorder import LayerFacts, RowShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


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


def current_layer(name: str) -> MoERunner:
    """The layer of that name in the model whose forward pass is running."""
    return cast("MoERunner", _forward_context()().no_compile_layers[name])


# Every layer asks at every step: an import statement takes longer than the call.
@functools.cache
def _forward_context() -> Callable[[], Any]:
    from vllm.forward_context import get_forward_context

    return cast(Callable[[], Any], get_forward_context)


def layer_facts(layer: MoERunner) -> LayerFacts:
    """What a recorder needs of a layer whose weights are in place."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    experts, config = layer.routed_experts, layer.moe_config

    def forward_experts(x_NH: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # Not `experts.forward_modular`: that is tapped.
        with columns_of(experts.quant_method.moe_kernel, ids.shape[1]), finalized(config):
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
        replica_of=functools.partial(first_replicas, layer) if moves_experts(layer) else None,
    )


def row_shape(layer: MoERunner) -> RowShape:
    """What the experts of a layer are given for a token: as wide as the kernel's weights, unless that pads itself."""
    config = layer.moe_config
    pads_itself = layer.routed_experts.quant_method.skip_forward_padding
    hidden = config.hidden_dim_unpadded if pads_itself else config.hidden_dim
    return RowShape(hidden, config.experts_per_token, config.in_dtype)


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


def cpu_kernel(layer: MoERunner) -> Any:
    """The kernel object of a layer that runs `cpu_fused_moe`, None when another kernel runs it."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if isinstance(experts, CPUUnquantizedExperts) and not experts._use_zentorch:
        return experts
    return None


def opaque_forward(layer: MoERunner) -> Callable[..., Any]:
    """vLLM's operator that runs a layer's Python at every step, whatever was compiled."""
    entries = torch.ops.vllm
    return cast(
        Callable[..., Any], entries.moe_forward if layer._shared_experts is None else entries.moe_forward_shared
    )


def run_overlapped_shared_experts(shared_experts: Any, shared_experts_input: torch.Tensor | None) -> None:
    """Runs the shared experts where the plain kernel would have run them inside itself; else does nothing."""
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

    if shared_experts is not None:
        shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
