"""The steps of a run: commands of the program called as functions. One whose output is there is not repeated."""

from __future__ import annotations

from pathlib import Path

from reap_serve.compare.measure import CompareSettings
from reap_serve.compare.record import Report
from reap_serve.compare.run import compare
from reap_serve.compare.sweep import sweep
from reap_serve.compare.write import write_report
from reap_serve.cycle.config import CycleConfig
from reap_serve.cycle.state import Inputs, write_record
from reap_serve.errors import InputFileError
from reap_serve.model import open_model
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.limits import ServingTarget
from reap_serve.plan.model_limits import limits_of_model
from reap_serve.plan.planner import format_plan, make_plan
from reap_serve.plan.record import Plan, read_plan
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.plan.sizes import measure_checkpoint
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.findings import VerifyReport
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify
from reap_serve.publish import write_file
from reap_serve.records import read_record
from reap_serve.statistics.drift import drift
from reap_serve.statistics.drift_record import Drift
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.merge import merge_files
from reap_serve.statistics.record import Statistics
from reap_serve.statistics.windows import parse_duration
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.refusal import Refusals
from reap_serve.traffic.request import Request

WINDOWS_NAME = "windows.safetensors"
DRIFT_NAME = "drift.json"
PLAN_NAME = "plan.json"
TRIAL_NAME = "trial"
CANDIDATE_NAME = "candidate"
VERIFY_NAME = "verify.json"
COMPARISON_NAME = "comparison"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"

SHARD_BYTES = 5 << 30
COPIES_AT_A_TIME = 2
# Names of the plans in the trial's report.
NEW, IN_USE = "candidate", "in-use"


def collect(config: CycleConfig, inputs: Inputs, run: Path) -> Statistics:
    """The statistics of the stretch, merged."""
    path = run / WINDOWS_NAME
    if not path.exists():
        text = config.statistics.half_life
        merged = merge_files([file.path for file in inputs.files], None if text is None else parse_duration(text))
        write_statistics(merged, str(path), overwrite=True)
    return read_statistics(str(path))


def measure_drift(before: Path, after: Statistics, criterion: str, keep: int, run: Path) -> Drift:
    """What moved since the plan in use was made."""
    path = run / DRIFT_NAME
    if not path.exists():
        write_record(path, drift(read_statistics(str(before)), after, criterion, keep, (str(before), "the windows")))
    return read_record(path, Drift, "drift")


def plan_of_size(config: CycleConfig, statistics: Statistics, run: Path) -> Plan:
    """The plan of the configured size by the configured criterion."""
    path = run / PLAN_NAME
    if not path.exists():
        choose = config.choose
        request = PlanRequest(
            size=Size(choose.keep_fraction, choose.keep_experts, None),
            criterion=choose.criterion,
            mix=choose.mix,
            objective="max-min" if choose.objective == "max-min" else "mean",
            target=ServingTarget(choose.multiple_of, choose.tensor_parallel_size, 1, None),
        )
        source = open_model(config.model)
        checkpoint = measure_checkpoint(source)
        evidence = gather(statistics, request, limits_of_model(statistics.header, source))
        decision = decide(evidence, request.size, checkpoint)
        write_file(path, format_plan(make_plan(statistics.header, evidence, decision, checkpoint)), overwrite=True)
    return read_plan(path)


def try_as_mask(config: CycleConfig, plan: Plan, in_use: Plan | None, requests: list[Request], run: Path) -> Report:
    """The plan, and the one in use beside it, as masks over the base on the held-out requests."""
    directory = run / TRIAL_NAME
    if not (directory / REPORT_NAME).exists():
        plans = {NEW: plan, **({} if in_use is None else {IN_USE: in_use})}
        comparison = sweep(config.model, plans, requests, settings_of(config, latency=False))
        write_report(comparison.report, directory, overwrite=True, plan=plan)
    return read_record(directory / REPORT_NAME, Report, "report")


def write_candidate(config: CycleConfig, run: Path) -> VerifyReport:
    """The checkpoint, pruned and checked against every byte that it was made from."""
    output, plan, verdict = run / CANDIDATE_NAME, run / PLAN_NAME, run / VERIFY_NAME
    if not output.exists():
        options = PruneOptions(MtpChoice.CUT, SHARD_BYTES, COPIES_AT_A_TIME)
        prune(config.model, plan, output, options, overwrite=False)
    if not verdict.exists():
        write_record(verdict, verify(output, config.model, plan))
    return read_record(verdict, VerifyReport, "verdict")


def compare_checkpoint(config: CycleConfig, plan: Plan, requests: list[Request], run: Path) -> Report:
    """The checkpoint against the base on the held-out requests, with latency and memory."""
    directory = run / COMPARISON_NAME
    if not (directory / REPORT_NAME).exists():
        found = compare(config.model, str(run / CANDIDATE_NAME), requests, settings_of(config, latency=True))
        write_report(found.report, directory, overwrite=True, plan=plan, replays=found.replays)
    return read_record(directory / REPORT_NAME, Report, "report")


def heldout_requests(config: CycleConfig) -> list[Request]:
    """The requests that judge the candidate.

    Raises:
        TrafficError: A line is malformed.
        InputFileError: There is no request.
    """
    traffic = config.traffic
    requests = list(read_traffic(traffic.heldout, slices=traffic.heldout_slices, skip_malformed=traffic.skip_malformed))
    if not requests:
        raise InputFileError("the held-out traffic holds no request", "name files with requests under [traffic]")
    return requests


def settings_of(config: CycleConfig, *, latency: bool) -> CompareSettings:
    """How the trial and the comparison are made."""
    engine = config.engine
    return CompareSettings(
        server_arguments=engine.server_arguments(),
        answers_per_slice=engine.answers_per_slice,
        max_answer_tokens=engine.max_answer_tokens,
        latency_requests=engine.latency_requests if latency else 0,
        concurrency=(engine.concurrency,),
        refusals=Refusals(config.traffic.skip_malformed),
    )


def page_of(directory: Path) -> Path:
    """The report to show: the page, or its figures where the packages for pages are not installed."""
    page = directory / PAGE_NAME
    return page if page.exists() else directory / REPORT_NAME
