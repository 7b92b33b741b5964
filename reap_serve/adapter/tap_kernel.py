"""Where a recorder meets vLLM's CPU kernel: as soon as it is over, while its scratch memory is as it left it.

Target: the name `torch.ops._C.cpu_fused_moe`, under which eager layers and compiled graphs look for the kernel at each
    call.
Why: few steps are recorded under a budget of time, and no other step should pay for it. An operator of Python in each
    layer's graph takes some ten microseconds a step, 1 % of a small model's throughput (`stand_in` has the figures).
How: in a recorded step another object stands under that name, which calls the kernel and then shows the call to the tap
    of the layer whose weights it was given. Between steps, and while vLLM traces its graphs, the kernel stands there.
    A recorded step in which a layer's kernel did not come by ends the recording.
    To put it there and back takes 0.2 microseconds a recorded step of one core of an AMD EPYC; to leave it there would
    take 0.2 a layer in every other step, and be in the way of an engine of this process whose graph is traced.
Upstream: none calls back after a layer's kernel.
Remove when: vLLM hands (input, weights, ids) of each fused MoE call to a plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reap_serve.adapter.stand_in import StandIn
from reap_serve.errors import EngineError

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


class KernelTaps:
    """The layers of one engine that see their kernel's calls in recorded steps: each by its `reap_tap`.

    Attributes:
        entered: Whether such a step runs.
    """

    def __init__(self) -> None:
        self.entered = False
        self._experts: list[RoutedExperts] = []
        self._by_weights: dict[int, RoutedExperts] = {}
        self._stand_in: StandIn | None = None
        self._calls = 0

    def add(self, layer: MoERunner) -> None:
        """Shows the layer's calls to `layer.routed_experts.reap_tap` from now on.

        Raises:
            EngineError: Another layer has the same weights.
        """
        self._experts.append(layer.routed_experts)
        if len({experts.w13_weight.data_ptr() for experts in self._experts}) < len(self._experts):
            raise EngineError(
                f"{layer.layer_name} shares its experts with another layer",
                "set read_kernel_rows to false in the additional configuration",
            )
        self._stand_in = self._stand_in or StandIn(torch.ops._C, "cpu_fused_moe", self._call)

    def enter(self) -> None:
        """A recorded step begins."""
        if self._stand_in is not None:
            # Weights may have been loaded anew.
            self._by_weights = {experts.w13_weight.data_ptr(): experts for experts in self._experts}
            self._calls = 0
            self._stand_in.enter()
            self.entered = True

    def leave(self) -> None:
        """The step is over.

        Raises:
            RuntimeError: A layer's kernel did not come by.
        """
        if self._stand_in is None:
            return
        self._stand_in.leave()
        self.entered = False
        if self._calls != len(self._experts):
            raise RuntimeError(f"a step called the kernels of {self._calls} of {len(self._experts)} layers by name")

    def _call(
        self,
        output: torch.Tensor,
        x_TH: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
        weights_TK: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weight_on_input: bool,
        activation: str,
        instructions: str,
    ) -> None:
        assert self._stand_in is not None
        # The kernel overwrites weights that were applied on the input.
        gate_TK = weights_TK.clone() if weight_on_input else weights_TK
        self._stand_in.operator.default(
            *(output, x_TH, w13, w2, w13_bias, w2_bias),
            *(weights_TK, expert_ids_TK, weight_on_input, activation, instructions),
        )
        experts = self._by_weights.get(w13.data_ptr())
        if experts is not None:
            self._calls += 1
            if experts.reap_tap is not None:
                experts.reap_tap.record(x_TH, gate_TK, expert_ids_TK)
