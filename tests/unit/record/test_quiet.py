"""Steps without a hook count like the others, and end where something changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_layer import FakeExperts, facts

from reap_serve.adapter import engine_view, seams
from reap_serve.record.observer import Observer
from reap_serve.record.quiet import QuietRun
from reap_serve.record.settings import ObserveSettings


def scheduled(
    rows: dict[str, int], new: tuple[str, ...] = (), finished: tuple[str, ...] = (), resumed: bool = False
) -> Any:
    """What the scheduler hands over, with prompts of two tokens."""
    return SimpleNamespace(
        num_scheduled_tokens=rows,
        finished_req_ids=set(finished),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, prompt_token_ids=[1, 1], sampling_params=None) for name in new
        ],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(rows) if resumed else set()),
    )


@pytest.mark.parametrize(
    "other",
    [
        scheduled({"a": 1}),
        scheduled({"a": 2, "b": 1}),
        scheduled({"a": 1, "c": 1}),
        scheduled({"a": 1, "b": 1}, resumed=True),
        scheduled({"a": 1, "b": 1}, finished=("a",), new=("a",)),
    ],
    ids=["a request fewer", "two rows", "another request", "computed anew", "another one of the same name"],
)
def test_a_step_that_is_not_like_the_last_one_is_not_of_the_run(other: Any) -> None:
    run = QuietRun({"a": 1, "b": 1}, steps=2)
    assert not run.passes(other)
    assert run.passes(scheduled({"b": 1, "a": 1}))
    assert run.passed == 1


def test_a_run_ends_when_its_steps_have_passed_and_when_it_is_told_to() -> None:
    like = scheduled({"a": 1})
    run = QuietRun({"a": 1}, steps=2)
    assert [run.passes(like) for _ in range(3)] == [True, True, False]
    assert run.end()
    ended = QuietRun({"a": 1}, steps=2)
    assert not ended.end()
    assert not ended.passes(like)


class Engine:
    """An observer of one layer, and the seam's calls: `steps` counts the ones that had hooks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
        layer: Any = SimpleNamespace(routed_experts=SimpleNamespace(reap_tap=None))
        monkeypatch.setattr(engine_view, "layer_facts", lambda layer: facts(FakeExperts()))
        settings = ObserveSettings(recorder="deferred", sample_fraction=fraction, read_kernel_rows=False)
        masks: Any = SimpleNamespace(admit=lambda *arguments: False)
        self.observer = Observer(settings, [layer], torch.device("cpu"), 1, masks, max_rows=8)
        self.position: dict[str, int] = {}
        self.steps = 0
        self._run: QuietRun | None = None

    def step(self, output: Any) -> None:
        names = list(output.num_scheduled_tokens)
        if self._run is None or not self._run.passes(output):
            self.steps += 1
            self.observer.catch_up()
            self.observer.requests_change(output)
            rows = list(output.num_scheduled_tokens.values())
            self.observer.rows_ordered(seams.BatchRows(names, rows, [self.position.get(name, 0) for name in names]))
            self.observer.step_ends(busy_seconds=0.25)
            self._run = self.observer.expect_quiet_run()
        for name in names:
            self.position[name] = self.position.get(name, 0) + output.num_scheduled_tokens[name]

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.step(scheduled({"a": 1, "b": 1}))


def test_steps_without_a_hook_count_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, fraction=0.02)
    engine.step(scheduled({"a": 2, "b": 2}, new=("a", "b")))
    engine.decode(2000)
    observer = engine.observer
    observer.catch_up()
    assert engine.steps < 200
    assert observer.busy_seconds == pytest.approx(0.25 * 2001)
    window = observer.snapshot().window
    assert (window.requests, window.prompt_tokens_total, window.prompt_tokens_computed) == (2, 4, 4)
    # Of 4004 tokens, in steps of two: Binomial(2000, 0.02), five standard deviations are 31 steps.
    assert window.sample_fraction * 4004 == pytest.approx(observer.tokens_recorded)
    assert abs(observer.tokens_recorded / 2 - 40) < 31
    # Computed anew from its prompt on: nothing of it counts again.
    engine.position["a"] = 0
    before = observer._sampler.real_tokens
    engine.step(scheduled({"a": 2002, "b": 1}, resumed=True))
    assert observer._sampler.real_tokens - before == 1


@pytest.mark.parametrize("action", ["start", "flush", "reset", "snapshot"])
def test_what_comes_between_two_steps_ends_the_run(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    engine = Engine(monkeypatch, fraction=0.0001)
    engine.step(scheduled({"a": 2, "b": 2}, new=("a", "b")))
    engine.decode(11)
    assert engine.steps == 2
    getattr(engine.observer, action)()
    assert engine.observer._sampler.real_tokens == (0 if action == "reset" else 26)
    engine.decode(1)
    assert engine.steps == 3
    # In a new window the first row of each request counts it.
    engine.decode(10)
    assert engine.steps == (4 if action == "reset" else 3)
    assert engine.observer.recording


def test_a_run_that_is_cut_short_makes_its_next_step_no_likelier(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, fraction=0.1)
    engine.step(scheduled({"a": 2, "b": 2}, new=("a", "b")))
    engine.decode(1)
    before = engine.observer.tokens_recorded
    for _ in range(3000):
        engine.decode(1)
        engine.observer.flush()
    # Binomial(3000, 0.1): five standard deviations are 82 steps of two tokens.
    assert abs((engine.observer.tokens_recorded - before) / 2 - 300) < 82


def test_nothing_is_expected_of_steps_that_are_all_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, fraction=1.0)
    engine.step(scheduled({"a": 2, "b": 2}, new=("a", "b")))
    engine.decode(10)
    assert engine.steps == 11
