"""`reap-serve compare`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import note, print_json, progress_bar
from reap_serve.cli.traffic import TrustTemplate, note_skipped
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from reap_serve.compare.measure import CompareSettings
    from reap_serve.compare.record import MemoryBudget
    from reap_serve.compare.run import Comparison, Progress
    from reap_serve.compare.task_results import TaskScore
    from reap_serve.plan.record import Plan
    from reap_serve.traffic.request import Request


_SIDES, _QUALITY, _LATENCY = "What is compared", "Quality and its limits", "Latency and load"
_TRAFFIC, _OUTPUT = "Traffic", "Output"


@app.command("compare")
def compare(
    base: Annotated[str, typer.Argument(help="Model directory, hub id, or URL of an OpenAI endpoint of vLLM.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory for report.json and report.html.", rich_help_panel=_OUTPUT)
    ],
    candidate: Annotated[
        str | None, typer.Argument(help="Likewise; left out with --sweep, whose plans are the candidates.")
    ] = None,
    traffic: Annotated[list[str] | None, typer.Argument(help="Files; - is stdin.", metavar="TRAFFIC...")] = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.", rich_help_panel=_TRAFFIC),
    ] = None,
    sweep: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PLAN",
            help="Compare the base under this plan, as a mask in one engine and without a checkpoint. Repeatable: the "
            "first is the report's candidate, all stand in its plot of quality against bytes.",
            rich_help_panel=_SIDES,
        ),
    ] = None,
    sweep_phase: Annotated[
        Literal["all", "decode", "both"],
        typer.Option(
            help="decode: plans write the answers, and the base reads the prompts; both: each plan twice.",
            rich_help_panel=_SIDES,
        ),
    ] = "all",
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A further candidate, of which the quality alone is measured. Repeatable.",
            rich_help_panel=_SIDES,
        ),
    ] = None,
    server_args: Annotated[
        str, typer.Option(help="Options of `vllm serve` for models served here.", rich_help_panel=_SIDES)
    ] = "",
    same_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for weights and KV cache together, such as 20GiB, the same for both models: the smaller one "
            "gets more KV cache.",
            rich_help_panel=_SIDES,
        ),
    ] = None,
    same_kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="KV cache, the same for both models: the smaller one takes less memory.",
            rich_help_panel=_SIDES,
        ),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable that holds the API key of the URLs.", rich_help_panel=_SIDES)
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="The candidate's plan, to draw in report.html.", rich_help_panel=_OUTPUT)
    ] = None,
    subspace: Annotated[
        Path | None, typer.Option(help="What `stats subspace` wrote, to show in report.html.", rich_help_panel=_OUTPUT)
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE>NUMBER",
            help="Exit 1 when this holds, such as 'slices.code.quality.kl_divergence_mean>0.05' or "
            "'slices.*.quality.loop_fraction_candidate>0.02'. Repeatable.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor/--no-noise-floor",
            help="Measure the base twice, and tell what differs.",
            rich_help_panel=_QUALITY,
        ),
    ] = True,
    max_answer_tokens: Annotated[
        int, typer.Option(min=1, help="Longest greedy answer.", rich_help_panel=_QUALITY)
    ] = 128,
    answers_per_slice: Annotated[
        int, typer.Option(min=0, help="Greedy answers in each slice; 0 for none.", rich_help_panel=_QUALITY)
    ] = 32,
    latency_requests: Annotated[
        int, typer.Option(min=0, help="Requests of each latency run; 0 for none.", rich_help_panel=_LATENCY)
    ] = 64,
    concurrency: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]", help="Requests under way at once; one latency run each.", rich_help_panel=_LATENCY
        ),
    ] = "4",
    load: Annotated[
        Literal["replay", "vllm-bench"],
        typer.Option(
            help="What sends the requests of latency runs: `replay` as they were recorded; `vllm bench serve` their "
            "prompts as text, those of 4 to 1024 tokens.",
            rich_help_panel=_LATENCY,
        ),
    ] = "replay",
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:MS",
            help="Objective of a good request: ttft, tpot or e2el. Repeatable.",
            rich_help_panel=_LATENCY,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOOL:TASK[,TASK...]",
            help="Run an evaluation tool against both: lm-eval, lm-eval-chat, evalplus (executes generated code here) "
            "or bfcl. Further options of the tool may follow inside the quotes. Repeatable.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    task_results: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BASE=CANDIDATE",
            help="Results that such a tool wrote, files or directories, to read instead. Repeatable.",
            rich_help_panel=_QUALITY,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="Format of the traffic; found out by default.", rich_help_panel=_TRAFFIC),
    ] = None,
    skip_malformed: Annotated[
        bool, typer.Option(help="Count malformed lines instead of stopping.", rich_help_panel=_TRAFFIC)
    ] = False,
    trust_template: TrustTemplate = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Compare a candidate with its base on your traffic: quality per slice, latency, memory."""
    files = list(traffic or [])
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
    from reap_serve.compare.gate import parse_gates, require_passed
    from reap_serve.compare.latency import parse_objectives
    from reap_serve.compare.measure import CompareSettings
    from reap_serve.compare.side import check_reference
    from reap_serve.compare.subspace import read_subspace
    from reap_serve.compare.task_tools import parse_task_runs
    from reap_serve.compare.vllm_bench import require_vllm_bench
    from reap_serve.compare.write import write_report
    from reap_serve.plan.record import read_plan
    from reap_serve.publish import refuse_existing_directory
    from reap_serve.traffic.malformed import Malformed
    from reap_serve.traffic.own_template import TemplateSandbox, refuse_own_template, special_tokens_of
    from reap_serve.traffic.read import parse_slices, read_traffic
    from reap_serve.traffic.refusal import Refusals

    refuse_existing_directory(output, overwrite)
    for reference in (base, *([candidate] if candidate else []), *(also or [])):
        check_reference(reference)
    if load == "vllm-bench":
        require_vllm_bench()
    malformed = Malformed()
    settings = CompareSettings(
        server_arguments=tuple(shlex.split(server_args)),
        api_key=os.environ.get(api_key_env) if api_key_env else None,
        max_answer_tokens=max_answer_tokens,
        answers_per_slice=answers_per_slice,
        latency_requests=latency_requests,
        concurrency=_concurrencies(concurrency),
        driver=load,
        objectives=parse_objectives(goodput or []),
        noise_floor=noise_floor,
        budget=_budget(same_memory, same_kv_cache),
        tasks=parse_task_runs(tasks or []),
        imported=_task_results(task_results or []),
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
    gates = parse_gates(fail_if or [], {request.slice for request in requests})
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
    require_passed(gates, report)


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


def _budget(same_memory: str | None, same_kv_cache: str | None) -> MemoryBudget | None:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from reap_serve.compare.record import MemoryBudget

    if same_memory is not None and same_kv_cache is not None:
        raise RequestError("--same-memory and --same-kv-cache contradict each other", "give one of them")
    text = same_memory or same_kv_cache
    if text is None:
        return None
    try:
        size_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise RequestError(f"{text} is no size", "give such as 20GiB or 4000000000") from None
    return MemoryBudget(same="kv_cache" if same_memory is None else "memory", size_bytes=size_bytes)


def _task_results(pairs: list[str]) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...]]:
    from reap_serve.compare.task_results import read_task_results

    base: tuple[TaskScore, ...] = ()
    candidate: tuple[TaskScore, ...] = ()
    for pair in pairs:
        one, separator, other = pair.partition("=")
        if not separator:
            raise RequestError(f"--task-results {pair} is not BASE=CANDIDATE", "give two paths")
        base, candidate = (*base, *read_task_results(Path(one))), (*candidate, *read_task_results(Path(other)))
    return base, candidate


def _concurrencies(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"--concurrency {text} is no list of numbers above 0", "give such as 4 or 1,4,16")
    return tuple(int(part) for part in parts)
