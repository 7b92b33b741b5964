"""What the report of `tune` has beyond that of `compare`: the choice, its limits, the trials."""

from __future__ import annotations

from reap_serve.compare.section import Cell, Row, Section
from reap_serve.tune.record import TuneReport


def tune_sections(report: TuneReport) -> tuple[Section, ...]:
    """The sections, the choice first."""
    split = report.split
    kept = f"{report.keep_experts} of {report.num_experts} experts per layer"
    notes = [
        f"{'The plan keeps' if report.plan else 'No plan holds: all'} {kept}. Why: {report.reason}.",
        "The figures above are of held-out requests, which chose among no rules. Parted by conversation, by a "
        f"hash with seed {split.seed}: "
        + ", ".join(f"{count} requests for {part}" for part, count in split.requests.items())
        + f"; {split.left_out} were left out.",
        f"{report.masked_tokens} masked tokens of {report.tokens}, {report.seconds:.0f} s; budget {report.budget}.",
        *report.notes,
    ]
    limits = tuple(
        Row(
            name=limit.limit,
            level="within" if limit.held else "beyond",
            group="limit",
            cells=(
                Cell(label="worst slice", text=limit.slice or "–"),
                Cell(label="end that hurts", text="–" if limit.value is None else f"{limit.value:.4g}"),
                Cell(label="held", text="yes" if limit.held else "no"),
            ),
        )
        for limit in report.limits
    )
    rounds = tuple(
        Row(
            name=f"round {number}",
            level=None,
            group="trials",
            cells=(
                Cell(label="experts kept", text=str(entry.keep_experts)),
                Cell(label="masks", text=str(entry.masks)),
                Cell(label="masked tokens", text=str(entry.masked_tokens)),
                Cell(label="seconds", text=f"{entry.seconds:.0f}"),
                Cell(label="explained", text="–" if entry.explained is None else f"{entry.explained:.0%}"),
            ),
        )
        for number, entry in enumerate(report.trials, 1)
    )
    sections = [Section("The choice", limits, tuple(notes), ())]
    if rounds:
        sections.append(Section("Trials", rounds, (), ()))
    return tuple(sections)
