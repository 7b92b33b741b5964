"""Plans, their differences and sweeps as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Column, Table

from reap_serve.cli.output import note, stdout
from reap_serve.errors import PlanError
from reap_serve.plan.difference import PlanDifference
from reap_serve.plan.record import Plan
from reap_serve.plan.summary import Summary, summary_of
from reap_serve.plan.sweep import SweepRow


def print_plan(plan: Plan, *, layers: bool = False) -> None:
    """Prints what a plan keeps and what it predicts; by layer where asked for."""
    counts = [len(layer.kept) for layer in plan.layers]
    kept = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    stdout.print(f"{kept} of {plan.layers[0].num_experts} experts in each of {len(counts)} layers, by {plan.criterion}")
    try:
        summary = summary_of(plan)
    except PlanError:
        summary = None
    if summary is not None:
        _print_predictions(summary)
    if layers:
        _print_layers(plan, summary)


def _print_predictions(summary: Summary) -> None:
    if summary.bytes is not None:
        before, after = summary.bytes.before, summary.bytes.after
        stdout.print(f"checkpoint {_size(before)} to {_size(after)} ({after / before - 1:+.1%})")
    table = Table("slice", _right("retained saliency"), _right("retained output"))
    for name, fraction in summary.retained_saliency.slices.items():
        table.add_row(name, f"{fraction:.1%}", f"{summary.retained_output[name]:.1%}")
    stdout.print(table)
    if summary.instability is not None:
        note(f"on as much traffic again {summary.instability.mean:.1%} of the decisions are expected to change")
    guards = summary.guards
    if guards.super_experts:
        note(f"{len(guards.super_experts)} super experts are kept whatever their score")
    if guards.unjudged_experts:
        note(
            f"{guards.unjudged_experts} experts were seen too little to be judged; {guards.unjudged_kept} of them stay"
        )
    if summary.max_min is not None:
        worst, bound = summary.max_min.worst_fraction, summary.max_min.bound_fraction
        note(f"the worst slice retains {worst:.2%}; no choice under the same limits retains more than {bound:.2%}")
    for line in summary.notes:
        note(f"note: {line}")


def _print_layers(plan: Plan, summary: Summary | None) -> None:
    table = Table(_right("layer"), _right("kept"), _right("retained saliency"), "dropped experts")
    retained = {} if summary is None else {layer.index: layer.mixture for layer in summary.retained_saliency.layers}
    for layer in plan.layers:
        share = f"{retained[layer.index]:.1%}" if layer.index in retained else "-"
        table.add_row(str(layer.index), str(len(layer.kept)), share, ranges(layer.dropped))
    stdout.print(table)


def print_difference(found: PlanDifference) -> None:
    """Prints what two plans disagree on."""
    stdout.print(
        f"{found.changed_fraction:.1%} of the experts are decided differently; overlap of the kept {found.overlap:.1%} "
        f"(A keeps {found.kept[0]} by {found.criteria[0]}, B {found.kept[1]} by {found.criteria[1]})",
    )
    table = Table(_right("layer"), _right("overlap"), "only A keeps", "only B keeps")
    for layer in found.layers:
        table.add_row(str(layer.index), f"{layer.overlap:.1%}", ranges(layer.only_a), ranges(layer.only_b))
    stdout.print(table)


def print_sweep(rows: Sequence[SweepRow], num_experts: int) -> None:
    """Prints the trade-off over sizes."""
    names = list(dict.fromkeys(name for row in rows for name in row.retained_saliency))
    table = Table(
        _right("keep"), _right("experts"), _right("bytes"), _right("instability"), *(_right(name) for name in names)
    )
    for row in rows:
        table.add_row(
            f"{row.keep_fraction:g}",
            "-" if row.keep_experts is None else f"{row.keep_experts}/{num_experts}",
            "-" if row.bytes_after is None else _size(row.bytes_after),
            "-" if row.instability is None else f"{row.instability:.1%}",
            *(f"{row.retained_saliency[name]:.1%}" if row.retained_saliency else "-" for name in names),
        )
    stdout.print(table)
    for row in rows:
        if row.refused is not None:
            note(f"{row.keep_fraction:g}: {row.refused}")


def ranges(ids: Sequence[int]) -> str:
    """Ascending ids with runs shortened: 0-3, 7."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _right(header: str) -> Column:
    return Column(header, justify="right")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"
