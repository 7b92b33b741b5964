"""One run of the loop after another, in a world where only the engines are played."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import small_checkpoint
from cycle_world import World, kept

from reap_serve.cycle import steps
from reap_serve.cycle.run import run_cycle
from reap_serve.cycle.state import State
from reap_serve.errors import EngineError, MismatchError, StorageError
from reap_serve.plan.record import read_plan


def test_the_first_run_makes_a_candidate_and_the_same_inputs_make_no_work(world: World) -> None:
    world.observe("monday", favourites=(1, 3))
    first = run_cycle(world.config)
    assert first.decision == "candidate"
    assert kept(first.candidate) == (1, 3)
    assert world.engine_calls == ["sweep", "compare"]
    assert first.report is not None
    assert Path(first.report).exists()
    again = run_cycle(world.config)
    assert again == first
    assert world.engine_calls == ["sweep", "compare"]
    assert json.loads((world.state / "decision.json").read_text())["decision"] == "candidate"


def test_more_of_the_same_traffic_is_nothing_to_do_also_while_the_candidate_waits(
    world: World,
) -> None:
    world.observe("monday", favourites=(1, 3))
    first = run_cycle(world.config)
    world.observe("tuesday", favourites=(1, 3))
    waiting = run_cycle(world.config)
    assert waiting.decision == "nothing"
    assert "the candidate that waits" in waiting.reason
    assert first.candidate is not None
    world.switch(first.candidate)
    world.observe("wednesday", favourites=(1, 3))
    served = run_cycle(world.config)
    assert served.decision == "nothing"
    assert "what is served" in served.reason
    assert world.engine_calls == ["sweep", "compare"]


def test_another_domain_makes_another_candidate_and_says_what_it_regained(world: World) -> None:
    world.observe("monday", favourites=(1, 3))
    first = run_cycle(world.config)
    assert first.candidate is not None
    world.switch(first.candidate)
    (world.root / "stats" / "monday.safetensors").unlink()
    world.observe("friday", favourites=(0, 2))
    moved = run_cycle(world.config)
    assert moved.decision == "candidate"
    assert kept(moved.candidate) == (0, 2)
    # As masks the plan in use costs 1 nat and the new one 0.01.
    assert moved.regained == pytest.approx({"default": 0.99})
    assert "regains 0.990 nats" in moved.reason
    drift = json.loads((Path(moved.run) / steps.DRIFT_NAME).read_text())
    assert drift["plan_would_change"]


def test_a_limit_that_does_not_hold_refuses_before_anything_is_pruned(world: World) -> None:
    world.damage = 0.5
    world.observe("monday", favourites=(1, 3))
    refused = run_cycle(world.config)
    assert refused.decision == "refused"
    assert refused.candidate is None
    # The interval of the made-up figures ends a quarter above them.
    assert "kl_divergence_mean<0.2 has 0.625 on default" in refused.reason
    assert not (Path(refused.run) / steps.CANDIDATE_NAME).exists()
    assert world.engine_calls == ["sweep"]


def test_a_checkpoint_that_does_worse_than_its_mask_is_refused_and_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.compare

    def worse(*arguments: object) -> object:
        world.damage = 0.5
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "compare", worse)
    world.observe("monday", favourites=(1, 3))
    refused = run_cycle(world.config)
    assert refused.decision == "refused"
    assert refused.reason.startswith("as a checkpoint")
    assert not (Path(refused.run) / steps.CANDIDATE_NAME).exists()


def test_too_little_or_foreign_statistics_are_nothing_to_do(world: World) -> None:
    assert "no statistics" in run_cycle(world.config).reason
    config = dict(small_checkpoint.CONFIG, max_position_embeddings=7)
    other = small_checkpoint.write_checkpoint(world.root / "other", config)
    world.observe("foreign", favourites=(1,), model=other)
    assert "no statistics of this model" in run_cycle(world.config).reason
    world.observe("old", favourites=(1, 3), days_ago=30)
    assert "no statistics of this model" in run_cycle(world.config).reason
    world.write_config(extra="")
    world.config.write_text(world.config.read_text().replace("min_tokens = 500", "min_tokens = 5000"))
    world.observe("new", favourites=(1, 3))
    assert "fewer than min_tokens 5,000" in run_cycle(world.config).reason


@pytest.mark.parametrize("step", ["collect", "plan_of_size", "sweep", "write_candidate", "compare"])
def test_a_run_that_was_cut_short_goes_on_and_repeats_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real = getattr(steps, step)

    def fails(*arguments: object, **keywords: object) -> object:
        raise EngineError("the power failed", "run it again")

    world.observe("monday", favourites=(1, 3))
    monkeypatch.setattr(steps, step, fails)
    with pytest.raises(EngineError):
        run_cycle(world.config)
    monkeypatch.setattr(steps, step, real)
    done = run_cycle(world.config)
    assert done.decision == "candidate"
    assert world.engine_calls == ["sweep", "compare"]
    assert len(State(world.state).runs()) == 1


def test_an_interrupted_run_ends_with_its_own_statistics_and_the_next_takes_the_newer_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.compare
    world.observe("monday", favourites=(1, 3))
    monkeypatch.setattr(steps, "compare", lambda *_: (_ for _ in ()).throw(EngineError("gone", "again")))
    with pytest.raises(EngineError):
        run_cycle(world.config)
    monkeypatch.setattr(steps, "compare", real)
    for number in range(9):
        world.observe(f"friday-{number}", favourites=(0, 2))
    assert kept(run_cycle(world.config).candidate) == (1, 3)
    assert kept(run_cycle(world.config).candidate) == (0, 2)


def test_candidates_beyond_the_rule_go_but_never_the_one_that_is_served(world: World) -> None:
    world.write_config("[retention]\ncandidates = 1\n")
    world.observe("a", favourites=(1, 3))
    first = run_cycle(world.config)
    assert first.candidate is not None
    world.switch(first.candidate)
    for name, favourites in (("b", (0, 2)), ("c", (0, 1))):
        for path in (world.root / "stats").iterdir():
            path.unlink()
        world.observe(name, favourites=favourites)
        latest = run_cycle(world.config)
        assert latest.decision == "candidate"
    there = sorted(str(run / "candidate") for run in State(world.state).runs() if (run / "candidate").exists())
    assert there == sorted([first.candidate, latest.candidate or ""])


def test_old_statistics_go_by_age_but_not_those_that_count(world: World) -> None:
    world.write_config('[retention]\nstatistics_age = "1d"\n')
    world.observe("old", favourites=(1, 3), days_ago=30)
    world.observe("counts", favourites=(1, 3), days_ago=3)
    foreign = world.root / "stats" / "weights.safetensors"
    small = small_checkpoint.safetensors_bytes({"a": ("U8", [1], b"x")})
    run_cycle(world.config)
    foreign.write_bytes(small)
    assert sorted(path.name for path in (world.root / "stats").iterdir()) == [
        "counts.safetensors",
        "weights.safetensors",
    ]


def test_metrics_tell_success_and_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write_config('[metrics]\ntextfile = "cycle.prom"\n')
    world.observe("monday", favourites=(1, 3))
    run_cycle(world.config)
    text = (world.root / "cycle.prom").read_text()
    assert 'reap_serve_cycle_decision{decision="candidate"} 1.0' in text
    assert "reap_serve_cycle_failed 0.0" in text
    assert "reap_serve_cycle_experts_kept 2.0" in text
    world.observe("tuesday", favourites=(0, 2))
    monkeypatch.setattr(steps, "collect", lambda *_: (_ for _ in ()).throw(EngineError("gone", "again")))
    with pytest.raises(EngineError):
        run_cycle(world.config)
    assert "reap_serve_cycle_failed 1.0" in (world.root / "cycle.prom").read_text()


def test_two_cycles_at_once_are_refused(world: World) -> None:
    world.observe("monday", favourites=(1, 3))
    with State(world.state).locked(), pytest.raises(StorageError, match="another cycle runs"):
        run_cycle(world.config)


def test_a_plan_file_may_be_what_is_served(world: World) -> None:
    plan = small_checkpoint.write_plan(world.root / "served", {0: [1, 3], 1: [1, 3]})
    assert read_plan(plan).layers[0].kept == (1, 3)
    world.observe("monday", favourites=(1, 3))
    assert run_cycle(world.config).decision == "nothing"


def test_a_served_plan_that_calls_its_layers_otherwise_is_refused(world: World) -> None:
    plan = small_checkpoint.write_plan(world.root / "served", {0: [1, 3], 1: [1, 3]})
    plan.write_text(plan.read_text().replace("model.layers.1", "model.layers.5"))
    world.observe("monday", favourites=(1, 3))
    with pytest.raises(MismatchError, match=r"index 1 'model\.layers\.5\.mlp\.experts'"):
        run_cycle(world.config)


def test_a_full_disk_ends_with_one_line_and_the_next_run_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is played full where the merged statistics are written; what was there stays as it was."""
    world.observe("monday", favourites=(1, 3))
    real = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run_cycle(world.config)
    monkeypatch.setattr(os, "fsync", real)
    assert not list(world.state.rglob("*.partial"))
    assert run_cycle(world.config).decision == "candidate"
