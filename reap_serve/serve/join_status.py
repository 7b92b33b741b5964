"""What the workers of several engines tell, as one: a server with data parallelism answers for all of its engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reap_serve.serve.live_status import GateMassReport, LayerBalance, RankStatus, SliceLimits, WriterReport, balance_of


def first_of_engines(ranks: Sequence[RankStatus]) -> tuple[RankStatus, ...]:
    """The first rank of each engine: it tells of the tokens that all ranks of the engine saw."""
    found = {rank.engine: rank for rank in reversed(ranks)}
    return tuple(found[engine] for engine in sorted(found))


def join_slices(ranks: Sequence[RankStatus]) -> dict[str, int]:
    """Recorded tokens by slice."""
    found: dict[str, int] = {}
    for rank in first_of_engines(ranks):
        for name, tokens in rank.slices.items():
            found[name] = found.get(name, 0) + tokens
    return found


def join_layers(ranks: Sequence[RankStatus]) -> tuple[LayerBalance, ...]:
    """Balance of all layers: pipeline ranks bring their own, tensor-parallel ones repeat them, engines add up."""
    counts = {(rank.engine, layer.layer): layer.counts for rank in reversed(ranks) for layer in rank.layers}
    totals: dict[int, list[tuple[int, ...]]] = {}
    for (_, layer), of_engine in counts.items():
        totals.setdefault(layer, []).append(of_engine)
    return tuple(balance_of(layer, np.array(totals[layer], np.int64).sum(axis=0)) for layer in sorted(totals))


def join_slice_limits(ranks: Sequence[RankStatus]) -> SliceLimits:
    """Which slices the engines tell apart, and how many requests came with further names."""
    limits = [rank.slice_limits for rank in first_of_engines(ranks)]
    return SliceLimits(
        max_slices=limits[0].max_slices,
        known=tuple(dict.fromkeys(name for each in limits for name in each.known)),
        allowed=limits[0].allowed,
        beyond={name: sum(each.beyond[name] for each in limits) for name in limits[0].beyond},
    )


def join_writers(ranks: Sequence[RankStatus]) -> WriterReport | None:
    """What became of the files of all ranks; None when none writes."""
    writers = [rank.writer for rank in ranks if rank.writer is not None]
    if not writers:
        return None
    return WriterReport(
        directory=writers[0].directory,
        age_seconds=max(writer.age_seconds for writer in writers),
        files_written=sum(writer.files_written for writer in writers),
        tokens_written=sum(writer.tokens_written for writer in writers),
        tokens_pending=sum(writer.tokens_pending for writer in writers),
        write_failures=sum(writer.write_failures for writer in writers),
        last_error=next((writer.last_error for writer in writers if writer.last_error is not None), None),
    )


def join_gate_mass(ranks: Sequence[RankStatus]) -> GateMassReport:
    """Dropped gate mass: of each slice the mean over the engines that saw it."""
    reports = [rank.gate_mass for rank in first_of_engines(ranks)]
    plans = dict.fromkeys(plan for report in reports for plan in report.plans)
    return GateMassReport(
        pruned=reports[0].pruned,
        refusal=next((report.refusal for report in reports if report.refusal is not None), None),
        served=_mean([report.served for report in reports]),
        plans={plan: _mean([report.plans.get(plan, {}) for report in reports]) for plan in plans},
    )


def _mean(of_engines: Sequence[dict[str, float]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for fractions in of_engines:
        for name, fraction in fractions.items():
            found.setdefault(name, []).append(fraction)
    return {name: sum(fractions) / len(fractions) for name, fractions in found.items()}
