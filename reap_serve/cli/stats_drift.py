"""`reap-serve stats drift`: has the traffic moved by more than chance?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from reap_serve.cli.output import print_json, stdout
from reap_serve.cli.stats import AsJson, Criterion, Keep, stats

if TYPE_CHECKING:
    from reap_serve.statistics.drift_record import Drift

SHOWN_EXPERTS = 10


@stats.command("drift")
def drift_command(
    before: Annotated[
        str, typer.Argument(metavar="A", help="What the plan in use was made from: file, directory or URL.")
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="What was observed since.")],
    criterion: Criterion = "reap",
    keep_experts: Keep = None,
    since: Annotated[
        str | None, typer.Option(metavar="7d", help="Of B, only files with a window that ended so long ago at most.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell which layers, experts and slices moved, and whether a new plan would differ by more than chance."""
    from reap_serve.statistics.drift import drift
    from reap_serve.statistics.merge import merge_files
    from reap_serve.statistics.storage import expand_directories
    from reap_serve.statistics.windows import require_any, select_since

    later = expand_directories([after])
    if since is not None:
        later = list(require_any(select_since(later, since), since).paths)
    a, b = merge_files([before]), merge_files(later)
    keep = max(1, a.header.model.num_experts // 2) if keep_experts is None else keep_experts
    found = drift(a, b, criterion, keep, (before, after))
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: Drift) -> None:
    from rich.table import Table

    layers = Table(title=f"{found.criterion}, keeping {found.keep_experts}", title_justify="left")
    for column in ("layer", "decisions that differ", "by chance (95 %)", "moved"):
        layers.add_column(column, justify="right")
    for layer in found.layers:
        low, high = layer.by_chance
        layers.add_row(
            str(layer.index), str(layer.changed_decisions), f"{low:.0f} to {high:.0f}", "yes" if layer.moved else "no"
        )
    stdout.print(layers)
    slices = Table(title="slices", title_justify="left")
    for column in ("slice", "tokens before", "after", "differ", "by chance (95 %)", "dropped gate mass", "after"):
        slices.add_column(column, justify="left" if column == "slice" else "right")
    for entry in found.slices:
        chance = "-" if entry.by_chance is None else f"{entry.by_chance[0]:.0f} to {entry.by_chance[1]:.0f}"
        masses = (entry.dropped_gate_mass_before, entry.dropped_gate_mass_after)
        slices.add_row(
            entry.slice,
            f"{entry.token_share_before:.1%}",
            f"{entry.token_share_after:.1%}",
            "-" if entry.changed_decisions is None else str(entry.changed_decisions),
            chance,
            *("-" if mass is None else f"{mass:.1%}" for mass in masses),
        )
    stdout.print(slices)
    if found.experts:
        experts = Table(title=f"experts that moved: {found.experts_moved}, the surest first", title_justify="left")
        for column in ("layer", "expert", "before", "after", "change (95 %)", "a new plan"):
            experts.add_column(column, justify="right")
        for expert in found.experts[:SHOWN_EXPERTS]:
            low, high = expert.interval
            experts.add_row(
                str(expert.index),
                str(expert.expert),
                f"{expert.before:.4g}",
                f"{expert.after:.4g}",
                f"{low:+.3g} to {high:+.3g}",
                {"kept": "keeps it", "dropped": "drops it"}.get(expert.tells or "", "-"),
            )
        stdout.print(experts)
    low, high = found.by_chance
    verdict = "differs by more than chance" if found.plan_would_change else "differs by no more than chance"
    stdout.print(
        f"a new plan {verdict}: {found.changed_decisions} decisions, {low:.0f} to {high:.0f} by chance, "
        f"p = {found.p_value:.3f}",
    )
