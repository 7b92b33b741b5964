"""Warm-up requests of vLLM's second model runner are no traffic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from reap_serve.adapter import seams
from reap_serve.adapter.seams import STEP_HOOKS
from reap_serve.record.step import BatchRows


class Runner:
    """As the second model runner is to its warm-up."""

    is_pooling_model, max_num_reqs, num_speculative_steps, max_model_len = False, 4, 0, 64

    def __init__(self) -> None:
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[], num_blocks=8)
        self.vllm_config = SimpleNamespace(num_lookahead_tokens=0)
        self.model_state = SimpleNamespace()
        self.kv_connector = SimpleNamespace(set_disabled=lambda disabled: None)
        self.ran: list[int] = []

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> None:
        """One step."""
        self.ran.append(scheduler_output.total_num_scheduled_tokens)
        if not dummy_run and scheduler_output.total_num_scheduled_tokens:
            self.prepare_inputs(scheduler_output)

    def prepare_inputs(self, scheduler_output: Any) -> Any:
        """Orders the rows."""
        return scheduler_output


class Worker:
    """As vLLM's worker."""

    def __init__(self) -> None:
        self.model_runner = Runner()

    def compile_or_warm_up_model(self) -> str:
        """Runs requests that nobody sent, by vLLM's own code."""
        from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

        assert run_mixed_prefill_decode_warmup(
            self.model_runner,  # type: ignore[arg-type]
            self.model_runner.execute_model,
            lambda grammar: None,
            num_tokens=8,
        )
        return "done"


class Hooks:
    """Notes what it is called for."""

    rows_wanted = True

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.called.append(name)


@pytest.fixture
def worker() -> Worker:
    class Steps(Runner):
        pass

    class Worked(Worker):
        pass

    def rows(runner: Any, scheduler_output: Any, prepared: Any) -> BatchRows:
        return BatchRows((), (), ())

    seams._wrap_steps(Steps, "prepare_inputs", rows)
    seams._wrap_warm_up(Worked)
    made = Worked()
    made.model_runner = Steps()
    return made


def test_nothing_sees_the_warm_up(worker: Worker) -> None:
    hooks = Hooks()
    setattr(worker.model_runner, STEP_HOOKS, hooks)
    assert worker.compile_or_warm_up_model() == "done"
    assert worker.model_runner.ran == [2, 8, 0]
    assert hooks.called == []
    worker.model_runner.execute_model(SimpleNamespace(**step()))
    assert hooks.called == ["step_begins", "rows_ordered", "step_ends"]


def test_nothing_sees_dummy_runs(worker: Worker) -> None:
    hooks = Hooks()
    setattr(worker.model_runner, STEP_HOOKS, hooks)
    worker.model_runner.execute_model(SimpleNamespace(**step()), dummy_run=True)
    assert hooks.called == []


def test_a_warm_up_that_fails_leaves_the_hooks(worker: Worker) -> None:
    hooks = Hooks()
    setattr(worker.model_runner, STEP_HOOKS, hooks)
    worker.model_runner.kv_connector = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        worker.compile_or_warm_up_model()
    assert vars(worker.model_runner)[STEP_HOOKS] is hooks


def test_an_engine_without_observation_warms_up_as_ever(worker: Worker) -> None:
    assert worker.compile_or_warm_up_model() == "done"
    assert STEP_HOOKS not in vars(worker.model_runner)


def step() -> dict[str, Any]:
    """A step of three tokens."""
    return {"total_num_scheduled_tokens": 3, "finished_req_ids": set(), "scheduled_new_reqs": []}
