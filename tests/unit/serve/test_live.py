"""Files, totals and failures of a serving rank, with a recorder that only counts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_engine import MODEL, FakeObserver, live_engine

from reap_serve.record.step import NewRequest
from reap_serve.serve.live_status import PlanEntry, balance_of
from reap_serve.serve.mask import PLAN_ARGUMENT
from reap_serve.serve.windows import LiveSetup
from reap_serve.statistics.file import read_statistics
from reap_serve.statistics.merge import merge_files


def setup(directory: Path, **changes: object) -> LiveSetup:
    """Of a server that writes rarely, so that the test decides when."""
    chosen = {
        "model": MODEL,
        "engine": {"vllm": "0.32.0"},
        "flush_seconds": 3600.0,
        "minimum_tokens": 10,
        "shared": False,
    }
    return LiveSetup(directory=str(directory), **{**chosen, **changes})  # type: ignore[arg-type]


def tokens_in(directory: Path) -> list[int]:
    """Tokens of each file, in the order of their names."""
    files = sorted(directory.glob("*.safetensors"))
    return [int(read_statistics(str(path)).layer_token_count_SPL.sum()) for path in files]


def test_each_flush_writes_what_came_since_the_last(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path), observer)
    for tokens in (100, 40):
        observer.record(tokens)
        live.flush()
    live.flush()
    assert tokens_in(tmp_path) == [100, 40]
    assert live.tokens_by_slice() == {"default": 140}
    assert live.expert_counts()[0].tolist() == [140, 140, 140] + [0] * 9
    header = read_statistics(str(next(tmp_path.iterdir()))).header
    assert (header.model, header.engine) == (MODEL, {"vllm": "0.32.0"})
    live.close()


def test_closing_writes_the_rest(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path), observer)
    observer.record(70)
    live.close()
    live.close()
    assert tokens_in(tmp_path) == [70]


def test_a_small_slice_waits_until_it_is_large(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path), observer)
    observer.record(6)
    live.flush()
    assert tokens_in(tmp_path) == []
    observer.record(6)
    live.flush()
    assert tokens_in(tmp_path) == [12]
    live.close()


def test_a_step_offers_when_a_file_is_due_and_an_idle_engine_by_its_tick(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path, flush_seconds=0.001), observer)
    observer.record(20)
    time.sleep(0.01)
    live.tick()
    assert observer.tokens_in_window == 0
    live.close()
    assert tokens_in(tmp_path) == [20]


def test_what_fails_is_counted_and_serving_goes_on(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path), observer)
    observer.record(20)
    observer.broken = True
    live.flush()
    status = live.status()
    assert (status.failures, status.complete) == (1, False)
    observer.broken = False
    observer.record(30)
    live.close()
    assert tokens_in(tmp_path) == [30]


def test_an_unwritable_directory_keeps_the_sums(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no directory")
    observer = FakeObserver()
    live = live_engine(setup(blocked / "below"), observer)
    observer.record(20)
    live.flush()
    writer = live.status().writer
    assert writer is not None
    assert (writer.files_written, writer.tokens_pending, writer.write_failures) == (0, 20, 1)
    blocked.unlink()
    live.flush()
    assert tokens_in(blocked / "below") == [20]
    live.close()


def test_reset_forgets_totals_and_keeps_files(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path), observer)
    observer.record(20)
    live.flush()
    observer.record(30)
    live.reset()
    live.close()
    assert tokens_in(tmp_path) == [20]
    assert live.tokens_by_slice() == {}
    assert int(live.expert_counts().sum()) == 0


def test_balance_by_hand() -> None:
    import numpy as np

    balance = balance_of(3, np.array([3, 1, 0, 0]))
    # (3 + 1)^2 / (4 * (9 + 1))
    assert (balance.layer, balance.routed_tokens, balance.unseen) == (3, 4, 2)
    assert balance.load_balance == pytest.approx(0.4)
    assert balance_of(0, np.zeros(4, np.int64)).load_balance is None


ENTRY = PlanEntry(id="", experts_kept=6, criterion="reap", bound=False)


def test_plans_without_a_name_and_a_request_are_freed() -> None:
    live = live_engine()
    for number in range(200):
        live.load_plan("p", ENTRY.model_copy(update={"id": f"i{number}"}), {0: list(range(6))})
        assert set(live.masks.gate_mass) == {f"i{number}"}
    live.load_plan("q", ENTRY.model_copy(update={"id": "i199"}), {0: list(range(6))})
    live.set_default("q")
    live.forget_plan("p")
    assert set(live.masks.gate_mass) == {"i199"}
    # A request under it keeps it until it ends.
    live.step_begins((), (NewRequest("a", 1, {PLAN_ARGUMENT: "i199"}),))
    live.forget_plan("q")
    assert (live.default, set(live.masks.gate_mass)) == (None, {"i199"})
    live.step_begins(("a",), ())
    live.tick()
    assert live.masks.gate_mass == {}
    # One that waited in the queue gets its plan back.
    live.step_begins((), (NewRequest("late", 1, {PLAN_ARGUMENT: "i7"}),))
    assert set(live.masks.gate_mass) == {"i7"}
    live.step_begins(("late",), ())
    live.tick()
    assert live.masks.gate_mass == {}


@pytest.mark.parametrize("places", [None, 1])
def test_a_plan_takes_the_place_of_the_one_with_its_name(places: int | None) -> None:
    live = live_engine(places=places)

    def load(name: str, plan: str) -> None:
        live.load_plan(name, ENTRY.model_copy(update={"id": plan}), {0: list(range(6))})

    load("p", "i0")
    load("p", "i1")
    assert (live.plans["p"].id, set(live.masks.gate_mass)) == ("i1", {"i1"})
    # While a request is under it, a second place is needed.
    live.step_begins((), (NewRequest("a", 1, {PLAN_ARGUMENT: "i1"}),))
    if places is None:
        load("p", "i2")
        return
    with pytest.raises(ValueError, match=r"the places that CUDA graphs have \(1\); .* --mask-places 2"):
        load("p", "i2")
    assert (live.plans["p"].id, set(live.masks.gate_mass)) == ("i1", {"i1"})
    live.step_begins(("a",), ())
    load("p", "i2")
    assert (live.plans["p"].id, set(live.masks.gate_mass)) == ("i2", {"i2"})


def test_reset_frees_the_slots_of_slices_and_status_counts_what_does_not_fit() -> None:
    live = live_engine()
    for number in range(5):
        live.step_begins((), (NewRequest(str(number), 1, {"reap_slice": f"s{number}"}),))
    limits = live.status().slice_limits
    assert (limits.max_slices, limits.known, limits.allowed) == (4, ("s0", "s1", "other"), ())
    assert limits.beyond == {"max_slices": 3, "slices": 0}
    live.step_begins(tuple("01234"), ())
    live.reset()
    limits = live.status().slice_limits
    assert (limits.known, limits.beyond) == ((), {"max_slices": 0, "slices": 0})


def test_what_ranks_can_only_measure_together_is_written_when_they_have(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path, flush_seconds=0.001), observer)
    observer.record(70)
    time.sleep(0.01)
    observer.unsettled = 3
    live.between_steps()
    assert not live.flush()
    assert tokens_in(tmp_path) == []
    assert live.flush()
    assert tokens_in(tmp_path) == [70]
    live.close()


def test_what_is_held_when_the_engine_stops_is_told_to_be_lost(tmp_path: Path) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path), observer)
    observer.record(70)
    observer.unsettled = 5
    live.close()
    (path,) = tmp_path.glob("*.safetensors")
    assert not read_statistics(str(path)).header.complete


def test_of_engines_that_share_the_traffic_one_that_hears_of_no_end_says_that_something_is_lost(tmp_path: Path) -> None:
    """Another may have died with what it had not written, also when this one has nothing more to write."""
    orderly, alone = (live_engine(setup(tmp_path / name, shared=True), FakeObserver()) for name in ("orderly", "alone"))
    for live in (orderly, alone):
        live.recorder.record(70)  # type: ignore[attr-defined]
        live.flush()
    orderly.farewell()
    for live in (orderly, alone):
        live.close()
    assert tokens_in(tmp_path / "orderly") == [70]
    assert merge_files([str(tmp_path / "orderly")]).header.complete
    assert tokens_in(tmp_path / "alone") == [70, 0]
    assert not merge_files([str(tmp_path / "alone")]).header.complete


@pytest.mark.parametrize(("tokens", "written"), [(70, [70]), (5, [0]), (0, [0])])
def test_a_torn_step_of_shared_traffic_is_written_before_the_process_can_be_killed(
    tokens: int, written: list[int], tmp_path: Path
) -> None:
    observer = FakeObserver()
    live = live_engine(setup(tmp_path, shared=True), observer)
    observer.record(tokens)
    live.step_begins((), ())
    live.step_fails()
    # A slice below the minimum is not written, but that something is lost.
    assert tokens_in(tmp_path) == written
    merged = merge_files([str(tmp_path)])
    assert not merged.header.complete
    assert merged.header.slices == ("default",)
    live.close()
    assert not merge_files([str(tmp_path)]).header.complete
