"""`reap-serve compare`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reap_serve.cli.app import app
from reap_serve.cli.compare_options import (
    Also,
    AnswersPerSlice,
    ApiKeyEnv,
    Base,
    Candidate,
    Concurrency,
    DrawnPlan,
    FailIf,
    FormatName,
    Goodput,
    Json,
    LatencyRequests,
    LoadDriver,
    MaxAnswerTokens,
    NoiseFloor,
    NoNoiseFloor,
    Output,
    Overwrite,
    SameKvCache,
    SameMemory,
    ServerArgs,
    SkipMalformed,
    Slices,
    Subspace,
    Sweep,
    SweepPhase,
    TaskResults,
    Tasks,
    Traffic,
    TrustTemplate,
    concurrencies,
    imported_scores,
    memory_budget,
)
from reap_serve.cli.output import note, print_json, progress_bar
from reap_serve.cli.traffic_options import NoSkipMalformed, named_files, note_repeated
from reap_serve.cli.traffic_tables import note_skipped
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from reap_serve.compare.measure import CompareSettings
    from reap_serve.compare.run import Comparison, Progress
    from reap_serve.plan.record import Plan
    from reap_serve.traffic.request import Request


@app.command("compare")
def compare(
    base: Base,
    output: Output,
    candidate: Candidate = None,
    traffic: Traffic = None,
    slices: Slices = None,
    sweep: Sweep = None,
    sweep_phase: SweepPhase = "all",
    also: Also = None,
    server_args: ServerArgs = "",
    same_memory: SameMemory = None,
    same_kv_cache: SameKvCache = None,
    api_key_env: ApiKeyEnv = None,
    plan: DrawnPlan = None,
    subspace: Subspace = None,
    fail_if: FailIf = None,
    no_noise_floor: NoNoiseFloor = False,
    noise_floor: NoiseFloor = False,
    max_answer_tokens: MaxAnswerTokens = 128,
    answers_per_slice: AnswersPerSlice = 32,
    latency_requests: LatencyRequests = 64,
    concurrency: Concurrency = "4",
    load: LoadDriver = "replay",
    goodput: Goodput = None,
    tasks: Tasks = None,
    task_results: TaskResults = None,
    format: FormatName = None,
    skip_malformed: SkipMalformed = False,
    no_skip_malformed: NoSkipMalformed = False,
    trust_template: TrustTemplate = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare a candidate with its base on your traffic: quality per slice, latency, memory.

    A limit names a figure of report.json, of one slice or with * of all of them:
    'slices.code.quality.kl_divergence_mean>0.05'.
    """
    files = list(traffic or [])
    skip_malformed = skip_malformed and not no_skip_malformed
    if sweep and candidate is not None:
        # The plans are the candidates: what stands second is traffic.
        files, candidate = [candidate, *files], None
    if not sweep and candidate is None:
        raise RequestError("no candidate was given", "name a model behind the base, or plans by --sweep")
    if not files and not slices:
        raise RequestError("no traffic was given", "name at least one TRAFFIC file or --slice NAME=FILE")
    if sweep and (also or tasks or task_results or same_memory or same_kv_cache or plan):
        raise RequestError(
            "--sweep measures the quality of plans alone",
            "leave out --also, --tasks, --task-results, --plan and the memory",
        )
    from reap_serve.compare.latency import parse_objectives
    from reap_serve.compare.measure import CompareSettings
    from reap_serve.compare.side import check_reference
    from reap_serve.compare.subspace import read_subspace
    from reap_serve.compare.task_tools import parse_task_runs
    from reap_serve.compare.thresholds import parse_thresholds, require_passed
    from reap_serve.compare.vllm_bench import require_vllm_bench
    from reap_serve.compare.write import write_report
    from reap_serve.plan.record import read_plan
    from reap_serve.publish import refuse_existing_directory
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.own_template import TemplateSandbox, refuse_own_template, special_tokens_of
    from reap_serve.traffic.read import parse_slices, read_traffic
    from reap_serve.traffic.refusal import Refusals

    models = [base, *([candidate] if candidate else []), *(also or [])]
    records = [path for path in (plan, subspace, *(sweep or [])) if path is not None]
    refuse_existing_directory(output, overwrite, [*models, *records, *named_files(files, slices)])
    for reference in models:
        check_reference(reference)
    if load == "vllm-bench":
        require_vllm_bench()
    note_repeated(files, slices)
    malformed = Malformed()
    settings = CompareSettings(
        server_arguments=tuple(shlex.split(server_args)),
        api_key=os.environ.get(api_key_env) if api_key_env else None,
        max_answer_tokens=max_answer_tokens,
        answers_per_slice=answers_per_slice,
        latency_requests=latency_requests,
        concurrency=concurrencies(concurrency),
        driver=load,
        objectives=parse_objectives(goodput or []),
        noise_floor=noise_floor or not no_noise_floor,
        budget=memory_budget(same_memory, same_kv_cache),
        tasks=parse_task_runs(tasks or []),
        imported=imported_scores(task_results or []),
        refusals=Refusals(skip_malformed, malformed),
    )
    read = None if plan is None else read_plan(plan)
    analysis = None if subspace is None else read_subspace(subspace)
    with TemplateSandbox(special_tokens_of(Path(base))) as sandbox:
        requests = list(
            read_traffic(
                files,
                format=format,
                slices=parse_slices(slices or []),
                skip_malformed=skip_malformed,
                malformed=malformed,
                settle_template=sandbox.settle if trust_template else refuse_own_template,
            )
        )
    thresholds = parse_thresholds(fail_if or [], {request.slice for request in requests})
    with progress_bar() as progress:
        shown: dict[str, TaskID] = {}

        def on_progress(side: str, done: int, total: int) -> None:
            if side not in shown:
                shown[side] = progress.add_task(side, total=total)
            progress.update(shown[side], completed=done, total=total)

        if sweep:
            comparison, read = _sweep(base, sweep, sweep_phase, requests, settings, on_progress)
        else:
            from reap_serve.compare.run import compare as run

            assert candidate is not None
            comparison = run(base, candidate, requests, settings, on_progress, also or ())
    note_skipped(malformed)
    report = comparison.report.model_copy(update={"subspace": analysis})
    written = write_report(report, output, overwrite=overwrite, plan=read, replays=comparison.replays)
    if as_json:
        print_json(report)
    else:
        from reap_serve.cli.compare_table import print_comparison

        print_comparison(report)
    for path in written:
        note(f"written: {path}")
    if output / "report.html" not in written:
        note("no report.html: pip install 'reap-serve[report]'")
    require_passed(thresholds, report)


def _sweep(
    base: str,
    paths: list[Path],
    phase: Literal["all", "decode", "both"],
    requests: list[Request],
    settings: CompareSettings,
    on_progress: Progress,
) -> tuple[Comparison, Plan]:
    """The comparison, and the plan of its candidate."""
    from reap_serve.compare.sweep import check_plans, read_plans, sweep

    plans = read_plans(paths)
    check_plans(base, plans)
    answering = {f"{name}-decode": plan for name, plan in plans.items()} if phase != "all" else {}
    tried = {**(plans if phase != "decode" else {}), **answering}
    comparison = sweep(base, tried, requests, settings, on_progress, tuple(answering))
    return comparison, next(iter(plans.values()))
