"""The planner keeps what the reference formula and llm-compressor keep, from the same routed tokens.

Where the definitions agree. For Qwen3-MoE (softmax over all experts, top-k of the logits, renormalised, no bias, no
groups) the reference implementation's gates (github.com/CerebrasResearch/reap since 2026-03-11) are those of the model,
so the same experts stay; for routers with biases, groups or sigmoids they differ, and the model's own gates are right.
llm-compressor's modifier (0.14) means g|f| with the model's own gates, as this project does; its fixture was made with
the pipeline that observes the whole model, since by default it observes a layer behind pruned ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from routed_tokens import DIRECTORY, DOMAINS, LayerTokens, expert_output, load_model, observe, statistics_of, token_ids
from transformers import Qwen3MoeForCausalLM

from reap_serve.model import fingerprint, open_model
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.record import Statistics

FIXTURE = Path(__file__).parent / "llmcompressor_retained.json"


@pytest.fixture(scope="module")
def model() -> Iterator[Qwen3MoeForCausalLM]:
    # Matrices this small are slower on many threads than on one.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model()
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def slices(model: Qwen3MoeForCausalLM) -> dict[str, list[LayerTokens]]:
    return {domain: observe(model, token_ids(domain)) for domain in DOMAINS}


@pytest.fixture(scope="module")
def statistics(model: Qwen3MoeForCausalLM, slices: dict[str, list[LayerTokens]]) -> Statistics:
    return statistics_of(model, slices)


@pytest.fixture(scope="module")
def reference(
    model: Qwen3MoeForCausalLM, slices: dict[str, list[LayerTokens]]
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """By domain and layer."""
    return {
        domain: [reference_scores(model, layer, tokens) for layer, tokens in enumerate(slices[domain])]
        for domain in ("code", "arithmetic")
    }


def kept_by(source: Statistics, request: PlanRequest) -> list[list[int]]:
    decision = decide(gather(source, request, limits_of_statistics(source.header)), request.size)
    return [np.flatnonzero(row).tolist() for row in decision.kept_LE]


@torch.no_grad()
def reference_scores(model: Qwen3MoeForCausalLM, layer: int, tokens: LayerTokens) -> dict[str, torch.Tensor]:
    """The reference implementation's formulas, [E] each: every expert on every token, with gates of its own."""
    block = model.model.layers[layer].mlp
    logits_TE = torch.nn.functional.linear(tokens.hidden_TH, block.gate.weight)
    probability_TE = torch.softmax(logits_TE, dim=-1)
    _, selected_TK = torch.topk(logits_TE, block.gate.top_k, dim=-1)
    weight_TE = probability_TE / probability_TE.gather(1, selected_TK).sum(dim=-1, keepdim=True)
    rows = []
    for expert in range(logits_TE.shape[1]):
        active_T = (selected_TK == expert).any(dim=-1)
        norm_T = torch.linalg.norm(expert_output(model, layer, expert, tokens.hidden_TH), dim=-1)[active_T]
        weighted_T = norm_T * weight_TE[active_T, expert]
        rows.append([weighted_T.mean(), norm_T.mean(), norm_T.sum(), weighted_T.sum(), active_T.sum()])
    columns = torch.nan_to_num(torch.tensor(rows)).unbind(dim=1)
    return dict(zip(("reap", "ean_mean", "ean_sum", "weighted_ean_sum", "frequency"), columns, strict=True))


def reference_kept(score_E: torch.Tensor, keep_fraction: float) -> list[int]:
    """The lowest are pruned, as many as the fraction gives rounded down."""
    _, pruned = torch.topk(score_E, int(len(score_E) * (1 - keep_fraction)), largest=False)
    return sorted(set(range(len(score_E))) - set(pruned.tolist()))


@pytest.mark.parametrize("criterion", ["reap", "ean_mean", "ean_sum", "weighted_ean_sum", "frequency"])
@pytest.mark.parametrize("keep_fraction", [0.75, 0.5, 0.25])
def test_the_reference_formula_keeps_the_same_experts(
    reference: dict[str, list[dict[str, torch.Tensor]]], statistics: Statistics, criterion: str, keep_fraction: float
) -> None:
    for domain, scores in reference.items():
        ours = kept_by(statistics, PlanRequest(Size(keep_fraction), criterion, mix={domain: 1.0}))
        for layer, score in enumerate(scores):
            theirs = reference_kept(score[criterion], keep_fraction)
            if criterion == "frequency":
                # Equal counts are frequent; the reference leaves their order to torch.topk.
                counts = score[criterion]
                assert sorted(counts[ours[layer]]) == sorted(counts[theirs])
            else:
                assert ours[layer] == theirs


def test_a_pooled_observation_is_the_pooled_tokens(
    model: Qwen3MoeForCausalLM, slices: dict[str, list[LayerTokens]], statistics: Statistics
) -> None:
    ours = kept_by(statistics, PlanRequest(Size(0.5)))
    for layer in range(len(ours)):
        parts = [slices[domain][layer] for domain in DOMAINS]
        pooled = LayerTokens(*(torch.cat([getattr(part, name) for part in parts]) for name in LayerTokens.__slots__))
        assert ours[layer] == reference_kept(reference_scores(model, layer, pooled)["reap"], 0.5)


@pytest.mark.parametrize("criterion", ["reap", "weighted_ean_sum", "frequency"])
@pytest.mark.parametrize("keep_fraction", [0.75, 0.5, 0.25])
def test_max_min_raises_the_worst_slice(statistics: Statistics, criterion: str, keep_fraction: float) -> None:
    worst = {}
    for objective in ("mean", "max-min"):
        request = PlanRequest(Size(keep_fraction), criterion, objective=objective)  # type: ignore[arg-type]
        evidence = gather(statistics, request, limits_of_statistics(statistics.header))
        kept_LE = decide(evidence, request.size).kept_LE
        worst[objective] = min(
            float(np.where(kept_LE, share_LE, 0).sum(axis=1).mean()) for share_LE in evidence.share_SLE
        )
    assert worst["max-min"] >= worst["mean"]


def fixture_cases() -> Sequence[dict[str, object]]:
    return json.loads(FIXTURE.read_text())["cases"] if FIXTURE.exists() else []


@pytest.mark.parametrize("case", fixture_cases(), ids=lambda case: f"{case['domain']}-{case['sparsity']}")
def test_llm_compressor_keeps_the_same_experts(statistics: Statistics, case: dict[str, object]) -> None:
    recorded = json.loads(FIXTURE.read_text())
    if recorded["weights_sha256"] != fingerprint(open_model(str(DIRECTORY / "model"))).weights_sha256:
        pytest.skip("the embedded model changed: run bench/plan_oracles.py again")
    retained = case["retained"]
    assert isinstance(retained, list)
    request = PlanRequest(Size(keep_experts=len(retained[0])), mix={str(case["domain"]): 1.0})
    assert kept_by(statistics, request) == retained
