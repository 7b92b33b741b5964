"""Fused experts that no tap reaches, and such as choose again behind the router: refused by name."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from reap_serve.adapter.releases.names import ClassNames  # noqa: E402
from reap_serve.adapter.releases.v0_33 import V0_33  # noqa: E402
from reap_serve.adapter.tap import add_tap  # noqa: E402
from reap_serve.adapter.unreached import BYPASSES, refuse_unreached  # noqa: E402
from reap_serve.errors import EngineError  # noqa: E402


def experts_of(plain: type | None = None) -> Any:
    """vLLM's routed experts, without their weights."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    made = object.__new__(plain or RoutedExperts)
    torch.nn.Module.__init__(made)
    return made


def layer_of(experts: Any, tapped: bool = True) -> Any:
    """vLLM's layer around them; not run."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    layer = object.__new__(MoERunner)
    torch.nn.Module.__init__(layer)
    layer.routed_experts, layer.layer_name = experts, "model.layers.3.mlp.experts"
    if tapped:
        add_tap(layer)
    return layer


def model_of(*layers: Any) -> Any:
    """A model with these layers under `mlp`."""
    return torch.nn.ModuleDict({f"mlp{number}": layer for number, layer in enumerate(layers)})


def substituted() -> type:
    """As vLLM 0.33's experts that stand for others."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    class SubstitutedRoutedExperts(RoutedExperts):  # type: ignore[misc]
        def forward_modular(self, *arguments: Any, **keywords: Any) -> Any:
            return super().forward_modular(*arguments, **keywords)

    return SubstitutedRoutedExperts


def test_a_model_of_tapped_layers_is_accepted() -> None:
    refuse_unreached(model_of(layer_of(experts_of()), layer_of(experts_of()), torch.nn.Linear(2, 2)))


def test_a_layer_of_a_class_that_was_not_replaced_is_refused() -> None:
    plain = layer_of(experts_of(), tapped=False)
    with pytest.raises(EngineError, match="mlp1 is a MoERunner, a layer of its own that observation does not reach"):
        refuse_unreached(model_of(layer_of(experts_of()), plain))


def test_experts_outside_of_a_layer_are_refused() -> None:
    with pytest.raises(EngineError, match="mlp0 is a RoutedExperts, a layer of its own"):
        refuse_unreached(model_of(experts_of()))


def test_experts_that_choose_again_are_refused() -> None:
    with pytest.raises(EngineError, match=r"routed_experts is a SubstitutedRoutedExperts, which .*expert substitution"):
        refuse_unreached(model_of(layer_of(experts_of(substituted()))))


def test_a_kernel_that_fuses_the_exchange_with_the_experts_is_refused() -> None:
    kernel: Any = type("DeepseekV4MegaMoEExperts", (torch.nn.Module,), {})
    with pytest.raises(EngineError, match="mlp0 is a DeepseekV4MegaMoEExperts, which shows nothing"):
        refuse_unreached(model_of(kernel()))
    # Of vLLM 0.31.
    derived: Any = type("DeepseekV4MegaMoEExpertsFI", (kernel,), {})
    with pytest.raises(EngineError, match="mlp0 is a DeepseekV4MegaMoEExpertsFI, which shows nothing"):
        refuse_unreached(model_of(derived()))


@pytest.mark.parametrize("kind", BYPASSES)
def test_what_computes_decode_steps_past_a_layer_is_refused(kind: str) -> None:
    """A module of the model, or what hangs on one; as in vLLM 0.33."""
    bypass: Any = type(kind, (torch.nn.Module,), {})()
    with pytest.raises(EngineError, match=f"mlp1: {kind} computes decode steps past the layer; "):
        refuse_unreached(model_of(layer_of(experts_of()), bypass))
    block = torch.nn.Linear(2, 2)
    block.mono = type(kind, (), {})()
    with pytest.raises(EngineError, match=f"mlp1: {kind} computes decode steps past the layer; "):
        refuse_unreached(model_of(layer_of(experts_of()), block))
    assert kind in {entry.name for entry in V0_33.names if isinstance(entry, ClassNames)}
