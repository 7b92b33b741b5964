"""Chooses the plan of a run: of a fixed size by a criterion, or by `tune` the smallest within limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reap_serve.cycle import steps
from reap_serve.cycle.config import CycleConfig
from reap_serve.plan.limits import ServingTarget
from reap_serve.plan.record import Plan, read_plan
from reap_serve.plan.request import Size
from reap_serve.publish import write_file
from reap_serve.records import read_record
from reap_serve.statistics.record import Statistics
from reap_serve.traffic.read import read_traffic
from reap_serve.tune.record import TuneReport
from reap_serve.tune.request import TuneRequest, parse_budget
from reap_serve.tune.run import tune

TUNE_NAME = "tune"


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        plan: The plan; None where nothing can go.
        reason: Why nothing can go.
        report: What shows it.
    """

    plan: Plan | None
    reason: str
    report: Path | None


def choose_plan(config: CycleConfig, statistics: Statistics, run: Path, say: Callable[[str], None]) -> Choice:
    """The plan of the run, also written as its plan.json."""
    if not config.choose.limits and not config.choose.tune:
        return Choice(steps.plan_of_size(config, statistics, run), "", None)
    directory = run / TUNE_NAME
    if not directory.exists():
        # A run of `tune` that was killed goes on where it was.
        tune(_request(config, run), say)
    report = read_record(directory / steps.REPORT_NAME, TuneReport, "report of tune")
    if report.plan is None:
        return Choice(None, report.reason, steps.page_of(directory))
    path = run / steps.PLAN_NAME
    if not path.exists():
        write_file(path, (directory / steps.PLAN_NAME).read_bytes(), overwrite=True)
    return Choice(read_plan(path), report.reason, steps.page_of(directory))


def _request(config: CycleConfig, run: Path) -> TuneRequest:
    choose, traffic = config.choose, config.traffic
    sized = choose.keep_fraction is not None or choose.keep_experts is not None
    return TuneRequest(
        model=config.model,
        requests=tuple(read_traffic(traffic.choose, skip_malformed=traffic.skip_malformed)),
        output=run / TUNE_NAME,
        limits=choose.limits,
        size=Size(choose.keep_fraction, choose.keep_experts) if sized else None,
        statistics=(str(run / steps.WINDOWS_NAME),),
        budget=parse_budget(choose.budget),
        target=ServingTarget(choose.multiple_of, choose.tensor_parallel_size, 1, None),
        seed=choose.seed,
        engine_arguments=config.engine.engine_args,
        max_answer_tokens=config.engine.max_answer_tokens,
        answers_per_slice=config.engine.answers_per_slice,
    )
