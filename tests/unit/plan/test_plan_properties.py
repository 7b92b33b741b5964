"""Whatever the model, the limits and the request: a plan that is valid, or a refusal with a reason.

The conditions are written out again here, from vLLM's sources and apart from `plan.limits`.
"""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statistics_of import statistics

from reap_serve.errors import ReapServeError
from reap_serve.plan.decision import Decision, Evidence, decide, gather
from reap_serve.plan.limits import ModelLimits, ServingTarget
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.statistics.record import Statistics

MANY = settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SOME = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])

counts = st.sampled_from([1, 1, 1, 1, 1, 1, 2, 3, 4, 8])


@st.composite
def models(draw: st.DrawFn) -> ModelLimits:
    num_groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    num_experts = num_groups * draw(st.sampled_from([1, 2, 4, 6, 8, 9, 12, 16]))
    return ModelLimits(
        architecture=draw(st.sampled_from(["qwen3_moe", "qwen3_moe", "deepseek_v4"])),
        num_experts=num_experts,
        top_k=min(draw(st.sampled_from([1, 2, 2, 4, 8])), num_experts),
        num_groups=num_groups,
        top_k_groups=draw(st.integers(1, num_groups)),
        quantization=draw(st.sampled_from([None, "fp8"])),
    )


@st.composite
def requests(draw: st.DrawFn, objective: str = "mean") -> PlanRequest:
    budget = draw(st.sampled_from(["uniform", "global"]))
    size = draw(
        st.one_of(
            st.builds(lambda fraction: Size(keep_fraction=fraction), st.floats(0.05, 1.0)),
            st.builds(lambda count: Size(keep_experts=count), st.integers(1, 24)),
            st.builds(lambda target: Size(target_bytes=target), st.integers(100, 3000)),
        )
    )
    return PlanRequest(
        size=size,
        criterion=draw(st.sampled_from(["reap", "frequency", "weighted_ean_sum", "random"])),
        objective=objective,  # type: ignore[arg-type]
        budget=budget,
        pad_to_max=budget == "global" and draw(st.booleans()),
        target=ServingTarget(
            draw(counts), draw(counts), draw(counts), draw(st.sampled_from([None, "triton", "flashinfer_trtllm"]))
        ),
        preserve_super_experts=draw(st.booleans()),
        min_tokens=draw(st.sampled_from([0, 0, 2, 5])),
        unseen=draw(st.sampled_from(["keep", "drop"])),
    )


@st.composite
def observed(draw: st.DrawFn, model: ModelLimits) -> Statistics:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), model.num_experts)
    token_count = rng.integers(0, draw(st.sampled_from([2, 10, 1000])), shape) * model.top_k
    # Rounding makes ties frequent.
    reap = np.round(rng.lognormal(0, 1, shape), draw(st.sampled_from([0, 1, 6])))
    return statistics({f"s{s}": (token_count[s], reap[s]) for s in range(shape[0])}, model.top_k)


def checkpoint_of(source: Statistics) -> CheckpointBytes:
    return CheckpointBytes(100, np.arange(5, 5 + len(source.header.layers)), 7)


def broken_conditions(evidence: Evidence, decision: Decision) -> list[str]:
    """Everything that router, engine and request forbid and the decision does."""
    model, request, target = evidence.model, evidence.request, evidence.request.target
    broken = []
    kept_counts = decision.kept_LE.sum(axis=1).tolist()
    for layer, count in enumerate(kept_counts):
        per_group = decision.kept_LE[layer].reshape(model.num_groups, -1).sum(axis=1)
        if not model.top_k <= count <= model.num_experts:
            broken.append("top_k")
        if model.num_groups > 1 and (
            len(set(per_group.tolist())) > 1
            or count <= model.num_groups
            or np.sort(per_group)[-model.top_k_groups :].sum() < model.top_k
        ):
            broken.append("groups")
        if count % target.multiple_of or count % target.expert_parallel_size or count < target.tensor_parallel_size:
            broken.append("divisibility")
        if model.architecture == "deepseek_v4" and count not in (1, 2, 4, 8, 16, 32, 64):
            broken.append("kernel")
        if model.quantization == "fp8" and target.moe_backend == "flashinfer_trtllm" and count % 4:
            broken.append("trtllm")
    if (request.budget == "uniform" or request.pad_to_max) and len(set(kept_counts)) > 1:
        broken.append("uniform")
    if (evidence.guards.super_LE & ~decision.kept_LE).any():
        broken.append("super experts")
    if request.unseen == "keep" and (evidence.guards.unjudged_LE & ~decision.kept_LE).any():
        broken.append("unseen")
    return broken


def attempt(source: Statistics, request: PlanRequest, model: ModelLimits) -> tuple[Evidence, Decision] | None:
    """The decision, or None after a refusal in words."""
    try:
        evidence = gather(source, request, model)
        return evidence, decide(evidence, request.size, checkpoint_of(source))
    except ReapServeError as error:
        refusal = error
    assert (refusal.exit_code, bool(refusal.what), bool(refusal.remedy)) == (2, True, True)
    return None


@MANY
@given(st.data(), models(), requests())
def test_a_plan_is_valid_or_refused(data: st.DataObject, model: ModelLimits, request: PlanRequest) -> None:
    source = data.draw(observed(model))
    found = attempt(source, request, model)
    if found is None:
        return
    evidence, decision = found
    assert broken_conditions(evidence, decision) == []
    if request.size.target_bytes is not None and not request.pad_to_max:
        assert checkpoint_of(source).at(decision.count_by_layer()) <= request.size.target_bytes


@SOME
@given(st.data(), models(), requests("max-min"))
def test_max_min_is_valid_beats_mean_and_stays_below_its_bound(
    data: st.DataObject, model: ModelLimits, request: PlanRequest
) -> None:
    source = data.draw(observed(model))
    found = attempt(source, request, model)
    if found is None:
        return
    evidence, decision = found
    assert broken_conditions(evidence, decision) == []
    result = decision.max_min
    assert result is not None
    mean = decide(gather(source, mean_of(request), model), request.size, checkpoint_of(source))
    worst = [
        min(float(np.where(kept_LE, share_LE, 0).sum(axis=1).mean()) for share_LE in evidence.share_SLE)
        for kept_LE in (mean.kept_LE, decision.kept_LE)
    ]
    assert worst[1] >= worst[0] - 1e-12
    assert abs(worst[1] - result.worst_fraction) < 1e-12
    if request.budget == "uniform" or request.pad_to_max:
        assert result.worst_fraction <= result.bound_fraction + 1e-12


def mean_of(request: PlanRequest) -> PlanRequest:
    fields = {name: getattr(request, name) for name in PlanRequest.__slots__}
    return PlanRequest(**{**fields, "objective": "mean"})


@SOME
@given(st.data(), models(), st.integers(1, 48), st.integers(1, 48), st.sampled_from([1, 2, 4]))
def test_a_larger_keep_contains_the_smaller(
    data: st.DataObject, model: ModelLimits, first: int, second: int, multiple_of: int
) -> None:
    source = data.draw(observed(model))
    kept = []
    for count in sorted((first, second)):
        request = PlanRequest(Size(keep_experts=count), target=ServingTarget(multiple_of))
        found = attempt(source, request, model)
        if found is None:
            return
        kept.append(found[1].kept_LE)
    assert (kept[0] <= kept[1]).all()


@SOME
@given(st.data(), models(), requests())
def test_equal_inputs_give_equal_choices(data: st.DataObject, model: ModelLimits, request: PlanRequest) -> None:
    source = data.draw(observed(model))
    first, second = attempt(source, request, model), attempt(source, request, model)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert np.array_equal(first[1].kept_LE, second[1].kept_LE)


@SOME
@given(st.data(), st.integers(2, 12), st.integers(1, 4))
def test_no_choice_of_a_global_budget_keeps_more(data: st.DataObject, num_experts: int, num_layers: int) -> None:
    """Against exhaustive search over all counts: the best of n experts of a layer are its n highest shares."""
    top_k = data.draw(st.integers(1, num_experts))
    size = data.draw(st.integers(top_k, num_experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    reap = rng.lognormal(0, 1, (num_layers, num_experts))
    source = statistics({"a": (np.full(reap.shape, 2 * top_k), reap)}, top_k)
    request = PlanRequest(Size(keep_experts=size), budget="global")
    found = attempt(source, request, ModelLimits("qwen3_moe", num_experts, top_k))
    assert found is not None
    evidence, decision = found
    assert decision.kept_LE.sum() == size * num_layers
    # best[n]: the largest sum of shares with n experts in the layers seen so far.
    best = {0: 0.0}
    for share_E in evidence.share_LE:
        prefix = np.concatenate([[0.0], np.cumsum(np.sort(share_E)[::-1])])
        layer = {count: prefix[count] for count in range(top_k, num_experts + 1)}
        grown: dict[int, float] = {}
        for used, value in best.items():
            for count, gain in layer.items():
                grown[used + count] = max(grown.get(used + count, -1.0), value + gain)
        best = grown
    assert np.isclose(np.where(decision.kept_LE, evidence.share_LE, 0).sum(), best[size * num_layers])
