"""EPLB: statistics are of experts, whichever replica served them and wherever it has moved since."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_layer import FakeExperts, facts

from reap_serve.adapter import layer_view, replicas
from reap_serve.adapter.tap import connect
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.clock import HostMeter
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.sampling import RowSampler
from reap_serve.record.tap import Tap

NUM_EXPERTS, TOKENS, HIDDEN = 4, 9, 8
CPU = torch.device("cpu")


class Boundary:
    """Lets everything through."""

    failures, own, step_recorded = 0, HostMeter(), True

    def guarded(self, action: Any) -> Any:
        return action()

    def fail(self, error: Exception) -> None:
        raise error


class MovingLayer:
    """Six replicas of four experts: replica r is of expert `experts[r]`, and only the kernel knows their weights."""

    def __init__(self, experts: Sequence[int]) -> None:
        self.replicas_ER = torch.full((NUM_EXPERTS, 3), -1)
        self.rearrange(experts)
        self.layer: Any = SimpleNamespace(
            router=SimpleNamespace(eplb_state=SimpleNamespace(logical_to_physical_map=self.replicas_ER)),
            moe_config=SimpleNamespace(num_experts=6, moe_parallel_config=SimpleNamespace(enable_eplb=True)),
            routed_experts=SimpleNamespace(),
        )
        plain = facts(FakeExperts(NUM_EXPERTS))
        self.facts = dataclasses.replace(
            plain,
            forward_experts=lambda x, weights, ids: plain.forward_experts(x, weights, self.experts[ids.long()]),
            replica_of=lambda ids: replicas.first_replicas(self.layer, ids),
        )

    def rearrange(self, experts: Sequence[int]) -> None:
        """In place, as vLLM does it."""
        self.experts = torch.tensor(experts)
        self.replicas_ER.fill_(-1)
        for expert in range(NUM_EXPERTS):
            replicas = [replica for replica, of in enumerate(experts) if of == expert]
            self.replicas_ER[expert, : len(replicas)] = torch.tensor(replicas)

    def serve(self, chosen_TK: torch.Tensor, seed: int) -> torch.Tensor:
        """Replicas of the chosen experts, drawn at random where there are several."""
        random = np.random.default_rng(seed)
        drawn = [
            random.choice([replica for replica, of in enumerate(self.experts.tolist()) if of == expert])
            for expert in chosen_TK.flatten().tolist()
        ]
        return torch.tensor(drawn, dtype=torch.int32).view(chosen_TK.shape)


def steps(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Inputs, gates and chosen experts."""
    random = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(TOKENS, HIDDEN, generator=random),
            torch.rand(TOKENS, 2, generator=random),
            torch.stack([torch.randperm(NUM_EXPERTS, generator=random)[:2] for _ in range(TOKENS)]).int(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("recorder_class", [DeferredRecorder, InlineRecorder])
def test_a_rearrangement_between_steps_and_before_measuring_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, recorder_class: Any
) -> None:
    monkeypatch.setattr(layer_view, "opaque_forward", lambda layer: None)
    sampler = RowSampler(1.0, 2, CPU)
    plain, sums = LayerSums(2, NUM_EXPERTS, CPU), LayerSums(2, NUM_EXPERTS, CPU)
    moving = MovingLayer([0, 1, 2, 3, 3, 1])
    rest = (64,) if recorder_class is DeferredRecorder else ()
    known = recorder_class(facts(FakeExperts(NUM_EXPERTS)), plain, sampler, *rest)
    recorder = recorder_class(moving.facts, sums, sampler, *rest)
    connect(moving.layer, Tap(Boundary(), recorder))
    arrangements = ([3, 2, 1, 0, 0, 0], [1, 1, 0, 2, 3, 2], [0, 1, 2, 3, 2, 1])
    for number, (x_TH, gate_TK, ids_TK) in enumerate(steps(len(arrangements))):
        sampler.begin(np.arange(TOKENS) % 2)
        known.record(x_TH, gate_TK, ids_TK)
        moving.layer.routed_experts.reap_tap.record(x_TH, gate_TK, moving.serve(ids_TK, number))
        sampler.end()
        moving.rearrange(arrangements[number])
    known.flush()
    recorder.flush()
    assert int(plain.tokens_S[:2].sum()) == TOKENS * len(arrangements)
    torch.testing.assert_close(sums.sums_SEC, plain.sums_SEC, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.maxima_SEC, plain.maxima_SEC, rtol=1e-6, atol=0)


def test_replicas_are_told_from_what_vllm_padded() -> None:
    moving = MovingLayer([2, 0, 1, 3, 2, 2])
    found = replicas.logical_ids(moving.layer, torch.tensor([[0, 5], [-1, 3]], dtype=torch.int32))
    assert found.tolist() == [[2, 2], [-1, 3]]
    assert found.dtype == torch.int32
    assert replicas.first_replicas(moving.layer, torch.tensor([[2, 0]])).tolist() == [[0, 1]]


def test_replicas_of_expert_parallel_ranks_are_each_measured_once() -> None:
    """Two ranks with three replicas each; what they measure is added up."""
    x_TH, gate_TK, ids_TK = steps(1)[0]
    alone = LayerSums(2, NUM_EXPERTS, CPU)
    told: list[torch.Tensor] = []
    ranks = []
    for first in (0, 3):
        moving = MovingLayer([0, 1, 2, 3, 3, 1])
        here = torch.full((6,), -1)
        here[first : first + 3] = torch.arange(3)

        def kernel(
            x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, moving: Any = moving, here: Any = here
        ) -> torch.Tensor:
            rows = x * (moving.experts[ids.long()] + 1) * weights
            return torch.where(here[ids.long()] >= 0, rows, torch.nan)

        ranks.append(dataclasses.replace(moving.facts, forward_experts=kernel, expert_map_E=here))
    for layer in (
        *(dataclasses.replace(rank, complete_sizes=lambda sizes: (told.append(sizes), sizes)[1]) for rank in ranks),
        dataclasses.replace(ranks[1], complete_sizes=lambda sizes: told[0] + sizes),
        facts(FakeExperts(NUM_EXPERTS)),
    ):
        sampler, sums = RowSampler(1.0, 2, CPU), LayerSums(2, NUM_EXPERTS, CPU)
        sampler.begin(np.arange(TOKENS) % 2)
        recorder = DeferredRecorder(layer, sums, sampler, 64)
        recorder.record(x_TH, gate_TK, ids_TK)
        recorder.flush()
        together, alone = alone, sums
    assert bool(torch.isfinite(together.sums_SEC).all())
    torch.testing.assert_close(together.sums_SEC, alone.sums_SEC, rtol=0, atol=0)
