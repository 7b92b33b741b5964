"""The whole command on an engine whose experts cost known nats: sizes, limits, budgets, and runs that were stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_of_known_costs import MODEL, FakeEngine, requests, use

from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import fingerprint, open_model
from reap_serve.plan.limits import ServingTarget
from reap_serve.plan.record import read_plan
from reap_serve.plan.request import Size
from reap_serve.tune.ledger import digest
from reap_serve.tune.record import TuneReport
from reap_serve.tune.request import Budget, TuneRequest
from reap_serve.tune.run import tune

# The first half costs nothing, each further expert more.
COST = [0.0] * 16 + [0.2 * number for number in range(1, 17)]
LIMIT = "slices.*.quality.perplexity_ratio<1.02"


def asked(output: Path, **changes: Any) -> TuneRequest:
    settings: dict[str, Any] = {
        "model": str(Path(__file__).parents[3] / "reap_serve" / "demo" / "tiny_moe" / "model"),
        "requests": requests(40),
        "output": output,
        "limits": (LIMIT,),
    }
    return TuneRequest(**(settings | changes))


def stripped(report: TuneReport) -> dict[str, Any]:
    """Without what the clock decides."""
    document = report.model_dump(exclude={"provenance", "seconds", "tokens", "masked_tokens"})
    for entry in document["trials"]:
        entry.pop("seconds")
    return document


def test_experts_that_cost_nothing_go_and_the_next_size_breaks_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEngine(COST))
    report = tune(asked(tmp_path / "out"))
    plan = read_plan(tmp_path / "out" / "plan.json")
    assert report.held
    assert report.plan == str(tmp_path / "out" / "plan.json")
    assert all(set(layer.kept) >= set(range(17, 32)) for layer in plan.layers)
    assert len(plan.layers[0].kept) == report.keep_experts
    asked_for = plan.provenance["request"]
    assert isinstance(asked_for, dict)
    assert asked_for["size"] == {"keep_fraction": None, "keep_experts": report.keep_experts, "target_bytes": None}
    assert report.next_smaller is not None
    assert report.next_smaller.keep_experts == report.keep_experts - 1
    assert not report.next_smaller.held
    assert report.next_smaller.part == "held-out"
    assert all(limit.held for limit in report.limits)
    chosen = [entry for entry in report.candidates if entry.chosen]
    assert [(entry.keep_experts, entry.part) for entry in chosen] == [(report.keep_experts, "held-out")]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["keep_experts"] == report.keep_experts
    assert not list(tmp_path.glob(".out*"))


def test_trials_find_what_criteria_misjudge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The statistics take 28 and 29, which cost nothing, for dear, and 30 and 31 for cheap.
    use(monkeypatch, FakeEngine([1.0] * 28 + [0.0, 0.0, 0.9, 0.9]))
    report = tune(asked(tmp_path / "out", limits=(), size=Size(keep_experts=30), requests=requests(100)))
    assert report.criterion == "trials"
    assert len(report.trials) == 3
    dropped = [expert for layer in read_plan(tmp_path / "out" / "plan.json").layers for expert in layer.dropped]
    assert sum(expert in (28, 29) for expert in dropped) >= 6
    by_reap = next(entry for entry in report.candidates if entry.criterion == "reap")
    of_plan = next(entry for entry in report.candidates if entry.criterion == "trials" and entry.part == "selection")
    assert of_plan.figures.kl_divergence_mean < 0.5 * by_reap.figures.kl_divergence_mean
    assert by_reap.over_reap is None
    assert of_plan.over_reap is not None
    assert of_plan.over_reap.p_value < 0.05
    expected = of_plan.figures.kl_divergence_mean - by_reap.figures.kl_divergence_mean
    assert of_plan.over_reap.kl_divergence_mean == pytest.approx(expected, abs=1e-9)
    assert "against reap" in report.reason


def test_reap_stays_where_no_rule_is_lower_than_it_by_more_than_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every criterion ranks alike here, so that all of them make one plan.
    use(monkeypatch, FakeEngine(COST))
    report = tune(asked(tmp_path / "out", limits=(), size=Size(keep_experts=12), trials=False))
    assert report.criterion == "reap"
    assert report.variant == ""
    assert "none that holds diverges less than reap by more than the noise" in report.reason
    others = [entry.over_reap for entry in report.candidates if entry.part == "selection" and entry.criterion != "reap"]
    assert others
    assert all(entry is not None and entry.kl_divergence_mean == 0.0 and entry.p_value == 1.0 for entry in others)


def test_every_size_that_was_tried_has_reap_to_compare_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(COST))
    report = tune(asked(tmp_path / "out"))
    chosen = [entry for entry in report.candidates if entry.part == "selection"]
    for size in {entry.keep_experts for entry in chosen}:
        names = [(entry.criterion, entry.variant) for entry in chosen if entry.keep_experts == size]
        assert ("reap", "") in names
        assert len(names) == len(set(names))


def test_nothing_can_go_within_a_limit_that_nothing_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine([1.0] * 32))
    report = tune(asked(tmp_path / "out", limits=("slices.*.quality.perplexity_ratio<0.5",)))
    assert report.plan is None
    assert not report.held
    assert report.keep_experts == 32
    assert "nothing can go" in report.reason
    assert not (tmp_path / "out" / "plan.json").exists()
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("budget", [Budget(masked_tokens=100), Budget(seconds=1e-9)], ids=["tokens", "time"])
def test_a_budget_that_affords_no_size_is_refused_with_its_numbers(
    budget: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEngine(COST))
    with pytest.raises(RequestError, match=r"too small: .* one size takes about \d+ masked tokens"):
        tune(asked(tmp_path / "out", budget=budget))
    assert not (tmp_path / "out").exists()


def test_a_budget_ends_the_search_early_and_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, tight = FakeEngine(COST), FakeEngine(COST)
    use(monkeypatch, free)
    whole = tune(asked(tmp_path / "whole"))
    use(monkeypatch, tight)
    report = tune(asked(tmp_path / "out", budget=Budget(masked_tokens=whole.masked_tokens // 4)))
    assert report.budget_exhausted
    assert report.masked_tokens <= whole.masked_tokens // 4
    assert report.keep_experts >= whole.keep_experts
    assert any("budget" in note for note in report.notes)


@pytest.mark.parametrize("share", [0.5, 0.65, 0.8, 0.9, 1.0])
def test_the_next_smaller_size_is_judged_or_the_report_says_that_it_was_not(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, tight = FakeEngine(COST), FakeEngine(COST)
    use(monkeypatch, free)
    whole = tune(asked(tmp_path / "whole", trials=False))
    assert whole.next_smaller is not None
    use(monkeypatch, tight)
    # Three looks are kept back while sizes are tried: each at 24 requests of 10 tokens, scored and answered.
    budget = Budget(masked_tokens=int(share * whole.masked_tokens) + 3 * 24 * 20)
    report = tune(asked(tmp_path / "out", budget=budget, trials=False))
    assert report.plan is not None
    assert (report.next_smaller is None) == any("was not judged" in note for note in report.notes)
    if share == 1.0:
        assert report.next_smaller is not None


def test_traffic_without_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(COST))
    with pytest.raises(RequestError, match="none of 10 requests has a recorded answer"):
        tune(asked(tmp_path / "out", requests=requests(5, answered=False)))


def test_a_model_that_no_engine_opens_leaves_nothing_behind(tmp_path: Path) -> None:
    link = tmp_path / os.fsdecode(b"m\xff")
    link.symlink_to(MODEL)
    with pytest.raises(InputFileError, match="open no path that is not UTF-8"):
        tune(asked(tmp_path / "out", model=str(link)))
    assert list(tmp_path.iterdir()) == [link]


def test_a_limit_on_what_the_traffic_never_asks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(COST))
    with pytest.raises(RequestError, match="was not measured on any slice"):
        tune(asked(tmp_path / "out", limits=("slices.*.quality.tool_calls_lost<=0",)))


def test_the_same_seed_gives_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = []
    for name in ("one", "two"):
        use(monkeypatch, FakeEngine(COST))
        (tmp_path / name).mkdir()
        reports.append(stripped(tune(asked(tmp_path / name / "out"))))
    one, two = (json.dumps(report).replace("/one/", "/two/") for report in reports)
    assert one == two


@pytest.mark.parametrize("after", [100, 300, 600])
def test_a_run_that_was_stopped_goes_on_and_ends_alike(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = FakeEngine(COST)
    use(monkeypatch, whole)
    expected = tune(asked(tmp_path / "a" / "out"))
    assert len(whole.scored) > after
    stopped = FakeEngine(COST, fail_after=after)
    use(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(asked(tmp_path / "b" / "out"))
    assert not (tmp_path / "b" / "out").exists()
    # As after a kill in the middle of a line.
    ledger = tmp_path / "b" / ".out.tune" / "ledger.jsonl"
    ledger.write_text(ledger.read_text() + '{"name": "selection:')
    again = FakeEngine(COST)
    use(monkeypatch, again)
    said: list[str] = []
    report = tune(asked(tmp_path / "b" / "out"), said.append)
    assert json.dumps(stripped(report)).replace("/b/", "/a/") == json.dumps(stripped(expected))
    assert any("going on" in line for line in said)
    assert len(again.scored) < len(whole.scored)
    assert not (tmp_path / "b" / ".out.tune").exists()


def test_a_ledger_of_another_release_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked(Path("out"))
    model = fingerprint(open_model(request.model))
    before = digest(request, model)
    assert digest(request, model) == before
    monkeypatch.setattr("reap_serve.tune.ledger.__version__", "9.9.9")
    assert digest(request, model) != before


def test_another_request_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(COST, fail_after=400))
    with pytest.raises(KeyboardInterrupt):
        tune(asked(tmp_path / "out"))
    use(monkeypatch, FakeEngine(COST))
    said: list[str] = []
    tune(asked(tmp_path / "out", seed=1), said.append)
    assert not any("going on" in line for line in said)


def test_sizes_keep_to_the_limits_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(COST))
    report = tune(asked(tmp_path / "out", target=ServingTarget(multiple_of=8)))
    assert report.keep_experts % 8 == 0
    assert {entry.keep_experts % 8 for entry in report.candidates} == {0}


def test_no_text_and_no_token_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine(COST, fail_after=600))
    with pytest.raises(KeyboardInterrupt):
        tune(asked(tmp_path / "out"))
    for path in (tmp_path / ".out.tune").iterdir():
        content = path.read_bytes()
        assert b"question" not in content
        assert b"answer 1" not in content
    sums = np.load(tmp_path / ".out.tune" / next(path.name for path in (tmp_path / ".out.tune").glob("*.npz")))
    assert set(sums.files) == {"xx", "xy", "yy", "mass"}
