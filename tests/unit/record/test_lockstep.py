"""Two or three data-parallel ranks in threads: they measure together or not at all, and their sums are those of one.

Expert e of layer l gives (e + 1) * (l + 1) * x.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from reap_serve.record.accumulate import LayerSums
from reap_serve.record.lockstep import Lockstep, LockstepRecorder
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.sampling import RowSampler

TRASH, EXPERTS, TOP_K, HIDDEN, LAYERS = 4, 6, 2, 8, 2
CPU = torch.device("cpu")


class World:
    """What the ranks share: a barrier, and a board on which each puts what it brings."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.board: list[object] = [None] * ranks
        self.calls: list[tuple[int, int]] = []

    def meet(self, rank: int, brought: object) -> list[object]:
        self.board[rank] = brought
        self.barrier.wait()
        found = list(self.board)
        self.barrier.wait()
        return found


class ThreadPeers:
    """See `record.lockstep.Peers`."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.num_rows: int | None = None

    def exchange(self, mine: Sequence[int]) -> Sequence[Sequence[int]]:
        found = self.world.meet(self.rank, ("exchange", tuple(mine)))
        assert all(kind == "exchange" for kind, _ in found)  # type: ignore[misc, has-type]
        return [numbers for _, numbers in found]  # type: ignore[misc, has-type]

    @contextlib.contextmanager
    def forward_of(self, num_rows: int) -> Iterator[None]:
        self.num_rows = num_rows
        yield
        self.num_rows = None


@dataclass
class Rank:
    """One rank with its layers; `kernel` meets the other ranks at each call."""

    world: World
    number: int
    capacity: int
    broken_at: int | None = None
    failures: list[Exception] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.peers = ThreadPeers(self.world, self.number)
        self.sampler = RowSampler(1.0, TRASH, CPU)
        self.lockstep = Lockstep(self.peers, self.sampler, self.capacity, self.fail)
        self.sums = [LayerSums(TRASH, EXPERTS, CPU) for _ in range(LAYERS)]
        self.recorders = [
            LockstepRecorder(self.facts(layer), sums, self.lockstep) for layer, sums in enumerate(self.sums)
        ]

    def fail(self, error: Exception) -> None:
        self.failures.append(error)
        self.sampler.end()

    def facts(self, layer: int) -> LayerFacts:
        def kernel(x_NH: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            assert x_NH.shape[0] == self.peers.num_rows
            found = self.world.meet(self.number, ("kernel", layer, x_NH.shape[0]))
            assert len(set(found)) == 1, found
            if self.number == 0:
                self.world.calls.append((layer, x_NH.shape[0]))
            assert bool(torch.isfinite(x_NH).all())
            return x_NH * (ids + 1) * (layer + 1) * weights

        return LayerFacts(f"layers.{layer}", layer, EXPERTS, TOP_K, 1.0, False, kernel)

    def forward(self, tokens: int, seed: int) -> None:
        """A step of so many tokens, or with none a dummy pass over one."""
        random = torch.Generator().manual_seed(seed)
        if tokens:
            self.sampler.begin(np.arange(tokens) % TRASH)
        for layer, recorder in enumerate(self.recorders):
            x_TH = torch.randn(max(tokens, 1), HIDDEN, generator=random)
            gate_TK = torch.rand(max(tokens, 1), TOP_K, generator=random)
            ids_TK = torch.stack(
                [torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(max(tokens, 1))]
            ).int()
            if self.broken_at == layer and tokens:
                ids_TK = torch.full_like(ids_TK, EXPERTS * TRASH * 9)
            recorder.record(x_TH, gate_TK, ids_TK)
        self.sampler.end()


def run(plans: Sequence[Sequence[int]], capacity: int, broken: int | None = None) -> tuple[World, list[Rank]]:
    """Ranks that run these numbers of tokens, one a step."""
    world = World(len(plans))
    ranks = [Rank(world, number, capacity, 0 if number == broken else None) for number in range(len(plans))]
    errors: list[BaseException] = []

    def serve(rank: Rank) -> None:
        try:
            for step, tokens in enumerate(plans[rank.number]):
                rank.forward(tokens, seed=100 * rank.number + step)
        except BaseException as error:  # noqa: BLE001 - told to the test
            errors.append(error)
            world.barrier.abort()

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return world, ranks


@pytest.mark.parametrize(
    ("plans", "capacity"),
    [
        ([[5, 3, 1, 0], [2, 0, 1, 0]], 8),
        # Each rank alone would be full at another step.
        ([[3, 3, 3, 3, 0], [1, 1, 1, 1, 0], [0, 0, 0, 7, 0]], 7),
        # More tokens at once than a buffer holds, while others hold some.
        ([[2, 0, 20, 1, 0], [3, 9, 1, 0, 0]], 4),
        ([[0, 0], [1, 0]], 1),
    ],
)
def test_sums_over_ranks_are_those_of_one_process(plans: Sequence[Sequence[int]], capacity: int) -> None:
    world, ranks = run(plans, capacity)
    assert all(rank.lockstep.held == 0 and not rank.failures for rank in ranks)
    # One process that measures each rank's steps one after the other, alone.
    alone = Rank(World(1), 0, capacity=64)
    for number, plan in enumerate(plans):
        for step, tokens in enumerate(plan):
            if tokens:
                alone.forward(tokens, seed=100 * number + step)
                alone.lockstep.settle()
                alone.forward(0, seed=0)
    for layer in range(LAYERS):
        together = sum(rank.sums[layer].sums_SEC[:TRASH] for rank in ranks)
        torch.testing.assert_close(together, alone.sums[layer].sums_SEC[:TRASH], rtol=1e-6, atol=0)
        counted = [int(rank.sums[layer].tokens_S[:TRASH].sum()) for rank in ranks]
        assert counted == [sum(plan) for plan in plans]
    assert all(rows <= capacity * TOP_K for _, rows in world.calls)


def test_what_is_held_when_all_fall_idle_is_measured_when_one_rank_asks() -> None:
    world = World(1)
    rank = Rank(world, 0, capacity=8)
    rank.forward(3, seed=0)
    assert rank.lockstep.held == 3
    rank.forward(2, seed=1)
    assert world.calls == []
    rank.lockstep.settle()
    rank.forward(1, seed=2)
    assert rank.lockstep.held == 1
    assert not rank.lockstep.wanted
    assert world.calls == [(0, 10), (1, 10)]


def test_discarded_rows_are_not_counted() -> None:
    rank = Rank(World(1), 0, capacity=8)
    rank.forward(3, seed=0)
    rank.lockstep.discard()
    rank.forward(0, seed=0)
    assert all(int(sums.tokens_S.sum()) == 0 for sums in rank.sums)


def test_a_rank_that_fails_goes_on_to_take_part() -> None:
    _, ranks = run([[3, 3, 3, 0], [3, 3, 3, 0]], capacity=4, broken=1)
    assert len(ranks[1].failures) >= 1
    assert not ranks[0].failures
    assert [int(sums.tokens_S[:TRASH].sum()) for sums in ranks[0].sums] == [9, 9]
