"""Where a recorder meets vLLM's CPU kernel: as soon as it is over, while its scratch memory is as it left it.

In eager mode Python runs at every step. In vLLM's compiled mode the kernel's operator is replaced in the graph by one
of the same signature that calls it and then shows the layer's tap what was routed: nothing can run in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reap_serve.observe import engine_view
from reap_serve.observe.operators import define

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def _fused_moe_op(
    output: torch.Tensor,
    input: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_id: torch.Tensor,
    skip_weighted: bool,
    act: str,
    isa: str,
    layer_name: str,
) -> None:
    gate_TK = _kept(topk_weights, skip_weighted)
    engine_view.cpu_fused_moe()(
        output, input, w13, w2, w13_bias, w2_bias, topk_weights, topk_id, skip_weighted, act, isa
    )
    tap = engine_view.current_layer(layer_name).reap_experts.reap_tap
    if tap is not None:
        tap.observe(input, gate_TK, topk_id)


define(
    "cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, str isa, str layer_name) -> ()",
    _fused_moe_op,
)


def tap_cpu_kernel(layer: MoERunner) -> None:
    """Lets a layer's CPU kernel show its calls to `layer.routed_experts.reap_tap`."""
    kernel = engine_view.cpu_kernel(layer)
    assert kernel is not None
    kernel.__class__ = _tapped_class(type(kernel))
    kernel.reap_experts = layer.routed_experts


def _kept(weights_TK: torch.Tensor, on_input: bool) -> torch.Tensor:
    """The weights as they are before the kernel, which overwrites those that were applied on the input."""
    return weights_TK.clone() if on_input else weights_TK


def _tapped_class(plain: Any) -> type:
    def apply(self: Any, **arguments: Any) -> None:
        weights, ids = arguments["topk_weights"], arguments["topk_ids"]
        on_input = arguments["apply_router_weight_on_input"]
        if torch.compiler.is_compiling():
            torch.ops.reap_serve.cpu_fused_moe(
                *(arguments[name] for name in ("output", "hidden_states", "w1", "w2")),
                *(self.w1_bias, self.w2_bias, weights, ids, on_input, arguments["activation"].value, self.isa),
                self.reap_experts.reap_layer_name,
            )
            return
        gate_TK = _kept(weights, on_input)
        plain.apply(self, **arguments)
        if self.reap_experts.reap_tap is not None:
            self.reap_experts.reap_tap.observe(arguments["hidden_states"], gate_TK, ids)

    return type(f"Tapped{plain.__name__}", (plain,), {"apply": apply})
