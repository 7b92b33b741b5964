"""`reap-serve stats`: show, merge, diff, export and import statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reap_serve.cli.app import app
from reap_serve.cli.output import keep_stdout_for, note, print_json, stdout
from reap_serve.cli.plan_options import CRITERIA_HELP

if TYPE_CHECKING:
    from reap_serve.statistics.difference import LayerDifference
    from reap_serve.statistics.overview import Overview
    from reap_serve.statistics.record import Statistics

stats = typer.Typer(help="Show, merge, compare and exchange statistics.", no_args_is_help=True)
app.add_typer(stats, name="stats")

Files = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="Statistics files, directories of them, or fsspec URLs.")
]
Criterion = Annotated[str, typer.Option(help=CRITERIA_HELP)]
Slices = Annotated[list[str] | None, typer.Option("--slice", metavar="NAME", help="Slices to pool; all by default.")]
Keep = Annotated[int | None, typer.Option(metavar="N", help="Experts kept per layer; half by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Output = Annotated[str, typer.Option("--output", "-o", metavar="PATH", help="File to write.")]
Form = Literal["llm-compressor", "reap"]


@stats.command("show")
def show(
    files: Files,
    criterion: Criterion = "reap",
    slices: Slices = None,
    keep_experts: Keep = None,
    flip_fraction: Annotated[
        float, typer.Option(min=0, help="A choice counts as sure when no more of its decisions are expected to change.")
    ] = 0.01,
    layer: Annotated[int | None, typer.Option(metavar="INDEX", help="Show the experts of this layer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was observed, how salient each expert is, and how sure that is."""
    from reap_serve.statistics.overview import document_of, overview

    shown = overview(_read(files, slices), criterion, keep_experts, flip_fraction)
    if as_json:
        print_json(document_of(shown))
    elif layer is None:
        _print_layers(shown)
    else:
        _print_experts(shown, layer)


@stats.command("merge")
def merge(
    files: Files,
    output: Output,
    since: Annotated[
        str | None,
        typer.Option(metavar="7d", help="Only files with a window that ended so long ago at most: s, m, h, d, w."),
    ] = None,
    half_life: Annotated[
        str | None,
        typer.Option(metavar="14d", help="Weigh files by age: what ended so long before the newest counts half."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add statistics files of one model into one; a window that is there twice is refused."""
    from reap_serve.file_kinds import STATISTICS
    from reap_serve.statistics.file import write_statistics
    from reap_serve.statistics.merge import merge_files
    from reap_serve.statistics.storage import expand_directories, refuse_existing
    from reap_serve.statistics.windows import parse_duration, require_any, select_since

    paths = expand_directories(files)
    keep_stdout_for(output)
    refuse_existing(output, overwrite, STATISTICS, paths)
    older = 0
    if since is not None:
        chosen = require_any(select_since(paths, since), since)
        paths, older = list(chosen.paths), len(chosen.older)
    merged = merge_files(paths, None if half_life is None else parse_duration(half_life))
    write_statistics(merged, output, overwrite=overwrite)
    summary = {
        "stats": output,
        "files": len(paths),
        "files_older": older,
        "windows": len(merged.header.windows),
        "slices": list(merged.header.slices),
        "tokens": sum(merged.tokens_per_slice()),
    }
    if as_json:
        print_json(summary)
    else:
        stdout.print(f"{output}: {summary['files']} files, {summary['tokens']:,} tokens")


@stats.command("diff")
def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="Statistics file, directory or URL.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another one, or the same with other slices.")],
    criterion: Criterion = "reap",
    keep_experts: Keep = None,
    slices_a: Annotated[list[str] | None, typer.Option("--slice-a", metavar="NAME", help="Slices of A.")] = None,
    slices_b: Annotated[list[str] | None, typer.Option("--slice-b", metavar="NAME", help="Slices of B.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two statistics layer by layer: has the traffic moved, and would the choice?"""
    from dataclasses import asdict

    from reap_serve.statistics.difference import difference, mean_of

    a, b = _read([left], slices_a), _read([right], slices_b)
    keep = max(1, a.header.model.num_experts // 2) if keep_experts is None else keep_experts
    layers = difference(a, b, criterion, keep, (left, right))
    means = {
        "spearman_mean": mean_of([layer.spearman for layer in layers]),
        "kept_overlap_mean": mean_of([layer.kept_overlap for layer in layers]),
        "kept_overlap_expected_mean": mean_of([layer.kept_overlap_expected for layer in layers]),
    }
    if as_json:
        print_json(
            {"criterion": criterion, "keep_experts": keep, **means, "layers": [asdict(layer) for layer in layers]}
        )
    else:
        _print_difference(layers, criterion, keep)


@stats.command("export")
def export(
    files: Files,
    output: Output,
    form: Annotated[Form, typer.Option("--format", help="llm-compressor's report, or the reference's observer file.")],
    criterion: Criterion = "reap",
    keep_experts: Keep = None,
    slices: Slices = None,
    overwrite: Overwrite = False,
) -> None:
    """Write statistics in the form of another tool."""
    from reap_serve.errors import RequestError
    from reap_serve.file_kinds import EXPERT_LISTS, OBSERVER_STATE
    from reap_serve.statistics.foreign import report_bytes, report_of
    from reap_serve.statistics.observer_state import write_observer_state
    from reap_serve.statistics.storage import refuse_existing, write_whole

    refuse_existing(output, overwrite, EXPERT_LISTS if form == "llm-compressor" else OBSERVER_STATE, files)
    if form == "llm-compressor" and keep_experts is None:
        raise RequestError("a report holds the experts that stay", "give --keep-experts N")
    statistics = _read(files, slices)
    if statistics.header.ageing is not None:
        raise RequestError(
            "aged statistics hold no whole counts, and other tools read counts", "merge without --half-life"
        )
    if form == "llm-compressor":
        content = report_bytes(report_of(statistics, criterion, keep_experts or 0))
    else:
        content = write_observer_state(statistics)
    write_whole(output, content, overwrite=overwrite)


@stats.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other tool's file.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="The model it was made of: directory or hub id.")],
    output: Output,
    form: Annotated[Form, typer.Option("--format", help="llm-compressor's report, or the reference's observer file.")],
    overwrite: Overwrite = False,
) -> None:
    """Read another tool's file into a statistics file."""
    from reap_serve.architectures.resolve import resolve
    from reap_serve.file_kinds import STATISTICS
    from reap_serve.model import fingerprint, open_model
    from reap_serve.statistics.file import write_statistics
    from reap_serve.statistics.foreign import statistics_of_report
    from reap_serve.statistics.observer_state import statistics_of_observer
    from reap_serve.statistics.storage import refuse_existing

    refuse_existing(output, overwrite, STATISTICS, [file])
    source = open_model(model)
    moe_layers = resolve(source.config).limits(source.config).moe_layers
    if form == "llm-compressor":
        statistics = statistics_of_report(file, fingerprint(source), moe_layers)
        note("a report holds which experts stay and no sums: plan with --keep-experts and its own number")
    else:
        statistics = statistics_of_observer(file, fingerprint(source), moe_layers)
        note("an observer file holds no second moments: no standard error, and msan and asq are 0")
    write_statistics(statistics, output, overwrite=overwrite)


def _read(files: list[str], slices: list[str] | None) -> Statistics:
    from reap_serve.statistics.file import read_statistics
    from reap_serve.statistics.merge import merge_files, select_slices
    from reap_serve.statistics.storage import expand_directories

    paths = expand_directories(files)
    statistics = read_statistics(paths[0]) if len(paths) == 1 else merge_files(paths)
    return select_slices(statistics, slices) if slices else statistics


def _print_layers(shown: Overview) -> None:
    import numpy as np
    from rich.table import Table

    header = shown.statistics.header
    tokens = ", ".join(
        f"{name} {count:,}" for name, count in zip(header.slices, shown.statistics.tokens_per_slice(), strict=True)
    )
    table = Table(title=f"{header.model.architecture}, {shown.criterion}; tokens: {tokens}", title_justify="left")
    for column in ("layer", "tokens", "unseen", "lowest", "median", "highest", "error", "instability"):
        table.add_column(column, justify="right")
    for row, layer in enumerate(header.layers):
        saliency_E, error_E = shown.saliency_LE[row], shown.error_LE[row]
        known_E = ~np.isnan(error_E) & (saliency_E > 0)
        error = f"{np.median(error_E[known_E] / saliency_E[known_E]):.2%}" if known_E.any() else "-"
        table.add_row(
            str(layer.index),
            f"{int(shown.sums.layer_token_count_L[row]):,}",
            str(int((shown.sums.token_count_LE[row] == 0).sum())),
            *(f"{value:.4g}" for value in (saliency_E.min(), np.median(saliency_E), saliency_E.max())),
            error,
            f"{shown.instability_L[row]:.2%}" if shown.has_errors else "-",
        )
    stdout.print(table)
    stdout.print(_instability(shown))
    if not header.complete:
        stdout.print("incomplete: a recorder stopped early, or layers are missing")


def _instability(shown: Overview) -> str:
    if not shown.has_errors:
        return f"{shown.criterion} has no standard error on these statistics"
    needed = "more tokens than can be told" if shown.tokens_needed is None else f"{shown.tokens_needed:,} tokens"
    return (
        f"keeping {shown.keep} of {shown.statistics.header.model.num_experts}: {shown.instability_L.mean():.2%} of the "
        f"decisions are expected to change on as much traffic again; {shown.max_instability:.2%} takes {needed} "
        f"(errors from {shown.error_source})"
    )


def _print_experts(shown: Overview, index: int) -> None:
    import numpy as np
    from rich.table import Table

    from reap_serve.errors import RequestError

    header = shown.statistics.header
    rows = {layer.index: row for row, layer in enumerate(header.layers)}
    if index not in rows:
        raise RequestError(f"layer {index} has no routed experts here", f"use one of: {', '.join(map(str, rows))}")
    row = rows[index]
    table = Table(title=f"{header.layers[row].name}, {shown.criterion}", title_justify="left")
    for column in ("rank", "expert", "tokens", "mean gate", "mean |f|", "saliency", "error"):
        table.add_column(column, justify="right")
    for rank, expert in enumerate(np.argsort(-shown.saliency_LE[row], kind="stable")):
        count = shown.sums.token_count_LE[row, expert]
        error = shown.error_LE[row, expert]
        means = (total[row, expert] / max(count, 1) for total in (shown.sums.gate_sum_LE, shown.sums.norm_sum_LE))
        table.add_row(
            str(rank + 1),
            str(expert),
            f"{int(count):,}",
            *(f"{mean:.4g}" for mean in means),
            f"{shown.saliency_LE[row, expert]:.4g}",
            "-" if np.isnan(error) else f"{error:.2g}",
            end_section=rank + 1 == shown.keep,
        )
    stdout.print(table)


def _print_difference(layers: tuple[LayerDifference, ...], criterion: str, keep: int) -> None:
    from rich.table import Table

    table = Table(title=f"{criterion}, keeping {keep}", title_justify="left")
    for column in ("layer", "spearman", "kept by both", "expected of one traffic"):
        table.add_column(column, justify="right")
    for layer in layers:
        expected = layer.kept_overlap_expected
        table.add_row(
            str(layer.index),
            "-" if layer.spearman is None else f"{layer.spearman:.3f}",
            f"{layer.kept_overlap:.1%}",
            "-" if expected is None else f"{expected:.1%}",
        )
    stdout.print(table)
