"""Reading rows from scratch memory that is laid out as vLLM's CPU kernel leaves it."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from fake_layer import FakeExperts, cells, facts, largest

from reap_serve.adapter.kernel_rows import KernelRows, Scratchpad, can_read
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.read import ReadRecorder
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.sampling import RowSampler

NUM_EXPERTS, HIDDEN, INTERMEDIATE, TRASH = 4, 2, 8, 4
X_TH = torch.tensor([[3.0, -4.0], [0.0, 2.0], [1.0, 0.0]])
IDS_TK = torch.tensor([[1, 0], [3, 2], [1, 3]], dtype=torch.int32)
GATE_TK = torch.tensor([[0.5, 0.25], [1.0, 0.125], [0.5, 0.5]])


class Manager:
    """The object that manages the scratch memory: size and pointer, as in the C++ extension."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = (ctypes.c_char * size_bytes)()
        self.fields = (ctypes.c_size_t * 2)(size_bytes, ctypes.addressof(self.memory))

    def scratchpad(self) -> Scratchpad:
        return Scratchpad(ctypes.addressof(self.fields))

    def leave(self, x_TH: torch.Tensor, ids_TK: torch.Tensor) -> None:
        """What the kernel leaves of a call in float32: expert e multiplies by e + 1; rows sorted by expert."""
        ids_N = ids_TK.flatten().numpy()
        order_N = np.argsort(ids_N, kind="stable")
        row_of_route_N = np.empty_like(order_N)
        row_of_route_N[order_N] = np.arange(len(order_N))
        token_N = order_N // ids_TK.shape[1]
        rows_NH = x_TH.numpy()[token_N] * (ids_N[order_N] + 1)[:, None]
        start = 0
        for part in (
            np.bincount(ids_N, minlength=NUM_EXPERTS).astype(np.int32),
            np.zeros(NUM_EXPERTS + 1, np.int32),
            token_N.astype(np.int32),
            row_of_route_N.astype(np.int32),
            np.zeros((len(ids_N), INTERMEDIATE), np.float32),
            rows_NH.astype(np.float32),
        ):
            content = part.tobytes()
            ctypes.memmove(ctypes.addressof(self.memory) + start, content, len(content))
            start += -(-len(content) // 64) * 64


def rows_of(manager: Manager, intermediate: int = INTERMEDIATE) -> KernelRows:
    return KernelRows(manager.scratchpad(), NUM_EXPERTS, intermediate, HIDDEN, activation_bytes=4)


def layer_over(manager: Manager) -> LayerFacts:
    """A layer whose kernel leaves its rows."""

    class LeavingExperts(FakeExperts):
        def forward(self, x_NH: torch.Tensor, weight_NK: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
            manager.leave(x_NH, ids_NK)
            return FakeExperts.forward(self, x_NH, weight_NK, ids_NK)

    return facts(LeavingExperts())


def test_rows_are_read_in_the_order_of_the_experts_with_the_place_of_each_slot() -> None:
    manager = Manager(8192)
    manager.leave(X_TH, IDS_TK)
    rows_NH, row_of_route_N = rows_of(manager).read(6)
    assert row_of_route_N.tolist() == [1, 0, 4, 3, 2, 5]
    assert rows_NH.tolist() == [[3, -4], [6, -8], [2, 0], [0, 6], [0, 8], [4, 0]]


def test_memory_that_grew_is_found_again_and_memory_too_small_is_refused() -> None:
    manager = Manager(512)
    manager.leave(X_TH[:1], IDS_TK[:1])
    rows = rows_of(manager)
    assert rows.read(2)[0].tolist() == [[3, -4], [6, -8]]
    with pytest.raises(ValueError, match="512 bytes"):
        rows.read(600)
    grown = Manager(8192)
    grown.leave(X_TH, IDS_TK)
    manager.fields[0], manager.fields[1] = grown.fields[0], grown.fields[1]
    assert rows.read(6)[0].shape == (6, HIDDEN)


def test_a_layer_is_read_only_where_the_memory_is_laid_out_as_expected() -> None:
    manager = Manager(65536)
    layer = layer_over(manager)
    assert can_read(rows_of(manager), layer, HIDDEN, torch.float32)
    assert not can_read(rows_of(manager, intermediate=INTERMEDIATE + 16), layer, HIDDEN, torch.float32)
    assert not can_read(rows_of(Manager(64)), layer, HIDDEN, torch.float32)
    assert not can_read(rows_of(manager), facts(FakeExperts()), HIDDEN, torch.bfloat16)


@pytest.mark.parametrize("held_tokens", [0, 2, 3, 100])
@pytest.mark.parametrize("slots", [[0, 3, TRASH], [0, 3, 0]])
def test_the_reading_recorder_adds_what_the_kernel_left(slots: list[int], held_tokens: int) -> None:
    manager, sampler = Manager(8192), RowSampler(1.0, TRASH, torch.device("cpu"))
    sums = LayerSums(TRASH, NUM_EXPERTS, torch.device("cpu"))
    recorder = ReadRecorder(facts(FakeExperts(), gate_scale=2.0), sums, sampler, rows_of(manager), held_tokens)
    sampler.begin(np.array(slots))
    manager.leave(X_TH, IDS_TK)
    recorder.record(X_TH, GATE_TK, IDS_TK)
    # The next call of the kernel.
    manager.leave(X_TH * 10, IDS_TK)
    held = sum(slot != TRASH for slot in slots) <= held_tokens
    assert bool(sums.tokens_S.any()) is not held
    recorder.flush()
    recorder.flush()
    # (slot, expert): count, g, |f|, |f|^2, g|f|, (g|f|)^2, with g twice the router's weight
    expected = {
        (0, 1): [1, 1, 10, 100, 10, 100],
        (0, 0): [1, 0.5, 5, 25, 2.5, 6.25],
        (3, 3): [1, 2, 8, 64, 16, 256],
        (3, 2): [1, 0.25, 6, 36, 1.5, 2.25],
    }
    if slots[2] == 0:
        expected |= {(0, 1): [2, 2, 12, 104, 12, 104], (0, 3): [1, 1, 4, 16, 4, 16]}
    found = cells(sums)[:TRASH]
    assert found.tolist() == [
        [expected.get((slot, expert), [0] * 6) for expert in range(NUM_EXPERTS)] for slot in range(TRASH)
    ]
    assert largest(sums)[0, 0].tolist() == [5, 4]


def test_between_two_steps_nothing_is_read() -> None:
    manager, sampler = Manager(64), RowSampler(1.0, TRASH, torch.device("cpu"))
    sums = LayerSums(TRASH, NUM_EXPERTS, torch.device("cpu"))
    recorder = ReadRecorder(facts(FakeExperts()), sums, sampler, rows_of(manager), held_tokens=2)
    recorder.record(X_TH, GATE_TK, IDS_TK)
    recorder.flush()
    assert not sums.tokens_S.any()


def test_a_full_buffer_is_measured_before_the_next_rows_are_held() -> None:
    manager, sampler = Manager(8192), RowSampler(1.0, TRASH, torch.device("cpu"))
    held, at_once = (LayerSums(TRASH, NUM_EXPERTS, torch.device("cpu")) for _ in range(2))
    holding = ReadRecorder(facts(FakeExperts()), held, sampler, rows_of(manager), held_tokens=5)
    plain = ReadRecorder(facts(FakeExperts()), at_once, sampler, rows_of(manager), held_tokens=0)
    counted = []
    for step in range(7):
        x_TH = X_TH * (step + 1)
        num_tokens = 2 + step % 2
        sampler.begin(np.full(num_tokens, step % TRASH))
        manager.leave(x_TH[:num_tokens], IDS_TK[:num_tokens])
        for recorder in (holding, plain):
            recorder.record(x_TH[:num_tokens], GATE_TK[:num_tokens], IDS_TK[:num_tokens])
        counted.append(int(held.tokens_S.sum()))
    # Steps of 2, 3, 2, 3, 2, 3 and 2 tokens fill a buffer of five every second time.
    assert counted == [0, 0, 5, 5, 10, 10, 15]
    holding.flush()
    assert torch.equal(held.tokens_S, at_once.tokens_S)
    assert torch.equal(held.sums_SEC, at_once.sums_SEC)
    assert torch.equal(held.maxima_SEC, at_once.maxima_SEC)
