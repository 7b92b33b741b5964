"""The kernel's calls in recorded steps, with a kernel that can be worked out in the head in the place of vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reap_serve.adapter.tap_kernel import KernelTaps
from reap_serve.errors import EngineError

X_TH = torch.tensor([[1.0, 2.0]])
GATE_TK = torch.tensor([[0.5, 0.25]])
IDS_TK = torch.tensor([[1, 0]], dtype=torch.int32)
Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernel:
    """Doubles its input; overwrites weights that were applied on the input, as vLLM's does."""

    default: Any

    def __init__(self) -> None:
        self.default = self

    def __call__(self, output: torch.Tensor, x_TH: torch.Tensor, *others: Any) -> None:
        output.copy_(2 * x_TH)
        if others[6]:
            others[4].fill_(1.0)


class Layer:
    """A layer with weights of its own, which keeps what its tap is shown."""

    def __init__(self, name: str) -> None:
        self.layer_name = name
        self.seen: list[Call] = []
        self.routed_experts = SimpleNamespace(w13_weight=torch.zeros(2, 2), reap_tap=self)

    def record(self, x_TH: torch.Tensor, gate_TK: torch.Tensor, expert_ids_TK: torch.Tensor) -> None:
        self.seen.append((x_TH.clone(), gate_TK.clone(), expert_ids_TK.clone()))


def forward(w13: torch.Tensor, compiled: bool, on_input: bool = False) -> torch.Tensor:
    """Calls the kernel as eager code and as inductor's code does."""
    output, weights_TK = torch.zeros(1, 2), GATE_TK.clone()
    arguments = (output, X_TH, w13, None, None, None, weights_TK, IDS_TK, on_input, "silu", "amx")
    name = torch.ops._C.cpu_fused_moe
    (name.default if compiled else name)(*arguments)
    return output


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(torch.ops._C, "cpu_fused_moe", kernel, raising=False)
    return kernel


def tapped(*layers: Any) -> KernelTaps:
    taps = KernelTaps()
    for layer in layers:
        taps.add(layer)
    return taps


@pytest.mark.parametrize("compiled", [False, True])
def test_each_layer_sees_the_calls_with_its_weights_while_a_step_is_recorded(kernel: Kernel, compiled: bool) -> None:
    layers = Layer("first"), Layer("second")
    taps = tapped(*layers)
    for recorded in (False, True, False):
        if recorded:
            taps.enter()
        for layer in layers:
            assert forward(layer.routed_experts.w13_weight, compiled).tolist() == [[2.0, 4.0]]
        if recorded:
            assert taps.entered
            taps.leave()
    assert torch.ops._C.cpu_fused_moe is kernel
    assert not taps.entered
    for layer in layers:
        [(x_TH, gate_TK, ids_TK)] = layer.seen
        assert torch.equal(x_TH, X_TH)
        assert torch.equal(gate_TK, GATE_TK)
        assert torch.equal(ids_TK, IDS_TK)


def test_weights_that_the_kernel_overwrites_are_seen_as_they_were(kernel: Kernel) -> None:
    layer = Layer("first")
    taps = tapped(layer)
    taps.enter()
    forward(layer.routed_experts.w13_weight, compiled=True, on_input=True)
    taps.leave()
    assert torch.equal(layer.seen[0][1], GATE_TK)


def test_weights_that_were_loaded_anew_are_found(kernel: Kernel) -> None:
    layer = Layer("first")
    taps = tapped(layer)
    layer.routed_experts.w13_weight = torch.ones(2, 2)
    taps.enter()
    forward(layer.routed_experts.w13_weight, compiled=True)
    taps.leave()
    assert len(layer.seen) == 1


def test_a_step_in_which_a_layer_did_not_come_by_is_told_and_the_kernel_is_back(kernel: Kernel) -> None:
    layers = Layer("first"), Layer("second")
    taps = tapped(*layers)
    taps.enter()
    forward(layers[0].routed_experts.w13_weight, compiled=True)
    # Of another engine in this process.
    assert forward(torch.zeros(2, 2), compiled=True).tolist() == [[2.0, 4.0]]
    with pytest.raises(RuntimeError, match="the kernels of 1 of 2 layers"):
        taps.leave()
    assert torch.ops._C.cpu_fused_moe is kernel
    assert not taps.entered


def test_layers_with_the_same_weights_cannot_be_told_apart(kernel: Kernel) -> None:
    layers = Layer("first"), Layer("second")
    layers[1].routed_experts.w13_weight = layers[0].routed_experts.w13_weight
    with pytest.raises(EngineError, match="second shares its experts"):
        tapped(*layers)


def test_without_layers_nothing_is_replaced(kernel: Kernel) -> None:
    taps = KernelTaps()
    taps.enter()
    assert torch.ops._C.cpu_fused_moe is kernel
    assert not taps.entered
