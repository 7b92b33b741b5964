"""A loop that is given limits: tune chooses the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_checkpoint
from cycle_world import World, kept

from reap_serve.cycle import choose, steps
from reap_serve.cycle.run import run_cycle
from reap_serve.errors import RequestError
from reap_serve.records import provenance
from reap_serve.tune.record import TuneReport
from reap_serve.tune.request import Budget, TuneRequest

NOTHING_FOUND = {
    "schema_version": 1,
    "provenance": provenance().model_dump(),
    "model": "base",
    "keep_experts": 2,
    "num_experts": 4,
    "criterion": "reap",
    "variant": "",
    "held": True,
    "reason": "nothing can go within the limits",
    "limits": [],
    "candidates": [],
    "held_out": {},
    "next_smaller": None,
    "held_out_looks": 1,
    "split": {"seed": 0, "requests": {}, "conversations": {}, "left_out": 0},
    "trials": [],
    "budget": "none",
    "budget_exhausted": False,
    "masked_tokens": 0,
    "tokens": 0,
    "seconds": 1.0,
    "notes": [],
}


def test_tune_chooses_where_limits_are_given_and_says_when_nothing_can_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune itself is played: it writes what it would write. Its request is what the configuration says."""
    text = world.config.read_text().replace("keep_experts = 2", 'limits = ["slices.*.quality.perplexity_ratio<1.5"]')
    world.config.write_text(text.replace("[traffic]", '[traffic]\nchoose = ["heldout.jsonl"]'))
    asked: list[TuneRequest] = []

    def played(request: TuneRequest, say: object) -> TuneReport:
        asked.append(request)
        request.output.mkdir()
        keeps = len(asked) == 1
        report = TuneReport.model_validate({**NOTHING_FOUND, "plan": "plan.json" if keeps else None})
        (request.output / "report.json").write_text(report.model_dump_json())
        if keeps:
            small_checkpoint.write_plan(request.output / "plan.json", {0: [0, 3], 1: [1, 3]})
        return report

    monkeypatch.setattr(choose, "tune", played)
    world.observe("monday", favourites=(1, 3))
    first = run_cycle(world.config)
    assert first.decision == "candidate"
    assert kept(first.candidate) == (0, 3)
    assert asked[0].limits == ("slices.*.quality.perplexity_ratio<1.5",)
    assert asked[0].statistics == (str(Path(first.run) / steps.WINDOWS_NAME),)
    assert asked[0].budget == Budget(seconds=1800.0)
    (world.root / "stats" / "monday.safetensors").unlink()
    world.observe("friday", favourites=(1, 2))
    refused = run_cycle(world.config)
    assert (refused.decision, refused.reason) == ("refused", "nothing can go within the limits")


def test_tune_speaks_of_the_keys_of_the_configuration(world: World) -> None:
    """Tune itself reads the limit, against the traffic to choose on."""
    text = world.config.read_text().replace("keep_experts = 2", 'limits = ["slices.*.quality.perplexity<1.5"]')
    world.config.write_text(text.replace("[traffic]", '[traffic]\nchoose = ["heldout.jsonl"]'))
    world.observe("monday", favourites=(1, 3))
    with pytest.raises(RequestError) as found:
        run_cycle(world.config)
    assert found.value.what.startswith(f"{world.config}: choose.limits 'slices.*.quality.perplexity<1.5'")
