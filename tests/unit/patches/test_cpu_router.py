"""The patched CPU router against the formula of each scheme, and its old schemes against the installed router."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

T, E, K = 64, 8, 3


@pytest.fixture
def patched(load_patched: Callable[[str, str], ModuleType]) -> ModuleType:
    return load_patched("0001-cpu-router-scores.patch", "vllm/model_executor/layers/fused_moe/router/cpu_router.py")


def route(module: ModuleType, logits_TE: torch.Tensor, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids of a router, ascending by id."""
    router = module.CPURouter(top_k=K, global_num_experts=E, **settings)
    weights_TK, ids_TK = router._compute_routing(torch.empty(len(logits_TE), 1), logits_TE, None)
    assert (weights_TK.dtype, ids_TK.dtype) == (torch.float32, torch.int32)
    assert weights_TK.is_contiguous()
    assert ids_TK.is_contiguous()
    order = ids_TK.argsort(-1)
    return weights_TK.gather(1, order), ids_TK.gather(1, order)


def by_hand(
    logits: list[float], bias: list[float], scoring: str, renormalize: bool, scale: float
) -> tuple[list[float], list[int]]:
    """One token in Python's floats."""
    if scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-each)) for each in logits]
    else:
        total = sum(math.exp(each) for each in logits)
        scores = [math.exp(each) / total for each in logits]
    ids = sorted(sorted(range(E), key=lambda expert: -(scores[expert] + bias[expert]))[:K])
    weights = [scores[expert] for expert in ids]
    total = sum(weights) if renormalize else 1.0
    return [scale * weight / total for weight in weights], ids


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_each_scheme_is_its_formula(patched: ModuleType, scoring: str, biased: bool, renormalize: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(T, E, generator=generator) * 2
    bias_E = torch.randn(E, generator=generator) if biased else torch.zeros(E)
    scale = 2.5 if biased else 1.0
    weights_TK, ids_TK = route(
        patched,
        logits_TE,
        scoring_func=scoring,
        renormalize=renormalize,
        e_score_correction_bias=bias_E if biased else None,
        routed_scaling_factor=scale,
    )
    moved = 0
    for token in range(T):
        weights, ids = by_hand(logits_TE[token].tolist(), bias_E.tolist(), scoring, renormalize, scale)
        assert ids_TK[token].tolist() == ids
        torch.testing.assert_close(weights_TK[token], torch.tensor(weights))
        moved += ids != sorted(logits_TE[token].topk(K).indices.tolist())
    assert bool(moved) == biased, "the bias of this test must change a choice"


def test_a_low_precision_router_is_scored_in_float32(patched: ModuleType) -> None:
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias_E = torch.full((E,), 0.25, dtype=torch.bfloat16)
    weights_TK, ids_TK = route(
        patched, logits_TE, scoring_func="sigmoid", renormalize=False, e_score_correction_bias=bias_E
    )
    expected_TE = logits_TE.float().sigmoid()
    torch.testing.assert_close(weights_TK, expected_TE.gather(1, ids_TK.long()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"renormalize": True},
        {"renormalize": False, "routed_scaling_factor": 2.0},
        {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2, "scoring_func": "sigmoid"},
    ],
)
def test_what_was_right_is_unchanged(patched: ModuleType, settings: dict[str, object]) -> None:
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(3))
    for left, right in zip(
        route(patched, logits_TE, **settings), route(cpu_router, logits_TE, **settings), strict=True
    ):
        assert torch.equal(left, right)


def test_an_unknown_score_is_refused(patched: ModuleType) -> None:
    with pytest.raises(ValueError, match="Unsupported scoring function: tanh"):
        route(patched, torch.zeros(1, E), scoring_func="tanh")


def test_the_installed_router_has_the_defect() -> None:
    """Fails when vLLM has mended it: the patch's Remove-when."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    with pytest.raises(AssertionError):
        route(cpu_router, torch.zeros(1, E), scoring_func="sigmoid")
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(4))
    _, without_TK = route(cpu_router, logits_TE)
    _, with_TK = route(cpu_router, logits_TE, e_score_correction_bias=torch.arange(E) * 1.0)
    assert torch.equal(without_TK, with_TK)
