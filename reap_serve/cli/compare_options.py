"""Options of `reap-serve compare`, and those that are small languages of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reap_serve.cli.traffic_options import trust_template_option
from reap_serve.errors import RequestError

if TYPE_CHECKING:
    from reap_serve.compare.record import MemoryBudget
    from reap_serve.compare.task_results import TaskScore

# Panels of the help.
SIDES, QUALITY, LATENCY = "What is compared", "Quality and its limits", "Latency and load"
TRAFFIC, OUTPUT = "Traffic", "Output"

Base = Annotated[str, typer.Argument(help="Model directory, hub id, or URL of an OpenAI endpoint of vLLM.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Directory for report.json and report.html.", rich_help_panel=OUTPUT)
]
Candidate = Annotated[
    str | None, typer.Argument(help="Likewise; left out with --sweep, whose plans are the candidates.")
]
Traffic = Annotated[list[str] | None, typer.Argument(help="Files; - is stdin.", metavar="TRAFFIC...")]
Slices = Annotated[
    list[str] | None,
    typer.Option("--slice", metavar="NAME=FILE", help="Slice of a file.", rich_help_panel=TRAFFIC),
]
Sweep = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PLAN",
        help="Compare the base under this plan, as a mask in one engine and without a checkpoint. Repeatable: the "
        "first is the report's candidate, all stand in its plot of quality against bytes.",
        rich_help_panel=SIDES,
    ),
]
SweepPhase = Annotated[
    Literal["all", "decode", "both"],
    typer.Option(
        help="decode: plans write the answers, and the base reads the prompts; both: each plan twice.",
        rich_help_panel=SIDES,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL",
        help="A further candidate, of which the quality alone is measured. Repeatable.",
        rich_help_panel=SIDES,
    ),
]
ServerArgs = Annotated[str, typer.Option(help="Options of `vllm serve` for models served here.", rich_help_panel=SIDES)]
SameMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for weights and KV cache together, such as 20GiB, the same for both models: the smaller one "
        "gets more KV cache.",
        rich_help_panel=SIDES,
    ),
]
SameKvCache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="KV cache, the same for both models: the smaller one takes less memory.",
        rich_help_panel=SIDES,
    ),
]
ApiKeyEnv = Annotated[
    str | None, typer.Option(help="Variable that holds the API key of the URLs.", rich_help_panel=SIDES)
]
DrawnPlan = Annotated[
    Path | None, typer.Option(help="The candidate's plan, to draw in report.html.", rich_help_panel=OUTPUT)
]
Subspace = Annotated[
    Path | None, typer.Option(help="What `stats subspace` wrote, to show in report.html.", rich_help_panel=OUTPUT)
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIGURE>NUMBER",
        help="Exit 1 when this holds of a figure of the report. Repeatable.",
        rich_help_panel=QUALITY,
    ),
]
NoNoiseFloor = Annotated[
    bool,
    typer.Option(
        "--no-noise-floor", help="Do not measure the base twice, which tells what differs.", rich_help_panel=QUALITY
    ),
]
# The default by its own name.
NoiseFloor = Annotated[bool, typer.Option("--noise-floor", hidden=True)]
MaxAnswerTokens = Annotated[
    int, typer.Option(min=1, metavar="N", help="Longest greedy answer.", rich_help_panel=QUALITY)
]
AnswersPerSlice = Annotated[
    int, typer.Option(min=0, metavar="N", help="Greedy answers in each slice; 0 for none.", rich_help_panel=QUALITY)
]
LatencyRequests = Annotated[
    int, typer.Option(min=0, metavar="N", help="Requests of each latency run; 0 for none.", rich_help_panel=LATENCY)
]
Concurrency = Annotated[
    str,
    typer.Option(metavar="N[,N...]", help="Requests under way at once; one latency run each.", rich_help_panel=LATENCY),
]
LoadDriver = Annotated[
    Literal["replay", "vllm-bench"],
    typer.Option(
        help="What sends the requests of latency runs: `replay` as they were recorded; `vllm bench serve` their "
        "prompts as text, those of 4 to 1024 tokens.",
        rich_help_panel=LATENCY,
    ),
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME:MS",
        help="Objective of a good request: ttft, tpot or e2el. Repeatable.",
        rich_help_panel=LATENCY,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOOL:TASK[,..]",
        help="Run an evaluation tool against both: lm-eval, lm-eval-chat, evalplus (executes generated code here) "
        "or bfcl. Further options of the tool may follow inside the quotes. Repeatable.",
        rich_help_panel=QUALITY,
    ),
]
TaskResults = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BASE=CANDIDATE",
        help="Results that such a tool wrote, files or directories, to read instead. Repeatable.",
        rich_help_panel=QUALITY,
    ),
]
FormatName = Annotated[
    str | None,
    typer.Option("--format", help="Format of the traffic; found out by default.", rich_help_panel=TRAFFIC),
]
SkipMalformed = Annotated[
    bool, typer.Option("--skip-malformed", help="Count malformed lines instead of stopping.", rich_help_panel=TRAFFIC)
]
TrustTemplate = Annotated[bool, trust_template_option(TRAFFIC)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel=OUTPUT)]


def memory_budget(same_memory: str | None, same_kv_cache: str | None) -> MemoryBudget | None:
    """What `--same-memory` or `--same-kv-cache` asks for, None without either.

    Raises:
        RequestError: Both are given, or what is given is no size.
    """
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


def imported_scores(pairs: list[str]) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...]]:
    """Scores of the base and of the candidate, from the pairs of `--task-results`.

    Raises:
        RequestError: A pair is not BASE=CANDIDATE.
        InputFileError: A path holds no results that are read.
    """
    from reap_serve.compare.task_results import read_task_results

    base: tuple[TaskScore, ...] = ()
    candidate: tuple[TaskScore, ...] = ()
    for pair in pairs:
        one, separator, other = pair.partition("=")
        if not separator:
            raise RequestError(f"--task-results {pair} is not BASE=CANDIDATE", "give two paths")
        base, candidate = (*base, *read_task_results(Path(one))), (*candidate, *read_task_results(Path(other)))
    return base, candidate


def concurrencies(text: str) -> tuple[int, ...]:
    """The numbers of `--concurrency`.

    Raises:
        RequestError: It is no list of numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"--concurrency {text} is no list of numbers above 0", "give such as 4 or 1,4,16")
    return tuple(int(part) for part in parts)
