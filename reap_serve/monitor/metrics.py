"""Every metric of ours on vLLM's /metrics, in one table. No series by expert: dashboards pay for each.

Plain gauges and counters, which also work where several API servers share one registry by files; the values are those
of the engine, so one of the servers sets them for all.

Traffic has moved onto dropped experts when, for some minutes,

    reap_serve_dropped_gate_mass_fraction - reap_serve_dropped_gate_mass_planned_fraction > 0.05

On traffic like the plan's the difference is that of two samples and of the hidden states, which pruning changes;
`bench/serve_drift.py` measures both sides of the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from reap_serve.serve.join_status import first_of_engines, join_gate_mass
from reap_serve.serve.live_status import LayerBalance, RankStatus

DRIFT_EXCESS = 0.05

Labels = tuple[str, ...]
Sample = tuple[Labels, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the metrics are made of.

    Attributes:
        ranks: Of all engines behind the server.
        layers: Balance of all layers.
        kv_cache_tokens: Capacity of the KV cache, None when vLLM does not say.
        served_planned: Dropped gate mass that the plan of a pruned checkpoint predicted, by slice.
        build: Labels of the build: version of reap-serve, of vLLM, served model.
    """

    ranks: Sequence[RankStatus]
    layers: Sequence[LayerBalance]
    kv_cache_tokens: int | None
    served_planned: dict[str, float]
    build: Labels


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: Without the suffix `_total` that a counter gets.
        help: What it says.
        read: Its samples, as absolute values.
        kind: Counters are absolute here too; the difference to the last reading is added.
        labels: Names of the labels.
    """

    name: str
    help: str
    read: Callable[[Reading], Iterator[Sample]]
    kind: Literal["gauge", "counter"] = "gauge"
    labels: Labels = ()


def _over_ranks(read: Callable[[RankStatus], float | None]) -> Callable[[Reading], Iterator[Sample]]:
    def samples(reading: Reading) -> Iterator[Sample]:
        yield (), float(sum(read(rank) or 0.0 for rank in reading.ranks))

    return samples


def _over_engines(
    read: Callable[[RankStatus], float], join: Callable[[Iterable[float]], float] = sum
) -> Callable[[Reading], Iterator[Sample]]:
    def samples(reading: Reading) -> Iterator[Sample]:
        yield (), float(join(read(rank) for rank in first_of_engines(reading.ranks)))

    return samples


def _overhead(reading: Reading) -> Iterator[Sample]:
    engines = first_of_engines(reading.ranks)
    busy_seconds = sum(rank.busy_seconds for rank in engines)
    if busy_seconds:
        yield (), sum(rank.recorder_seconds for rank in engines) / busy_seconds


def _flush_age(reading: Reading) -> Iterator[Sample]:
    ages = [rank.writer.age_seconds for rank in reading.ranks if rank.writer is not None]
    if ages:
        yield (), max(ages)


def _load_balance(reading: Reading) -> Iterator[Sample]:
    known = [layer.load_balance for layer in reading.layers if layer.load_balance is not None]
    if known:
        yield (), sum(known) / len(known)


def _plan_active(reading: Reading) -> Iterator[Sample]:
    mask = reading.ranks[0].mask
    for name in mask.plans:
        yield (name,), float(name == mask.default)


def _dropped(reading: Reading) -> Iterator[Sample]:
    report = join_gate_mass(reading.ranks)
    for slice_name, fraction in report.served.items():
        yield ("", slice_name), fraction
    for name, entry in reading.ranks[0].mask.plans.items():
        for slice_name, fraction in report.plans.get(entry.id, {}).items():
            yield (name, slice_name), fraction


def _planned(reading: Reading) -> Iterator[Sample]:
    """What the plan predicted of each measured slice, or of its own worst slice where it knows none of that name."""
    planned = {name: entry.planned_dropped_gate_mass for name, entry in reading.ranks[0].mask.plans.items()}
    planned[""] = reading.served_planned
    for (name, slice_name), _ in _dropped(reading):
        by_slice = planned.get(name, {})
        if by_slice:
            yield (name, slice_name), by_slice.get(slice_name, max(by_slice.values()))


def _kv_cache(reading: Reading) -> Iterator[Sample]:
    if reading.kv_cache_tokens is not None:
        yield (), float(reading.kv_cache_tokens)


TABLE = (
    Metric("reap_serve_recording", "1 while tokens are recorded.", _over_engines(lambda rank: rank.recording, min)),
    Metric(
        "reap_serve_tokens_observed", "Tokens recorded.", _over_engines(lambda rank: rank.tokens_observed), "counter"
    ),
    Metric(
        "reap_serve_tokens_masked",
        "Tokens of requests under a plan; they are not recorded.",
        _over_engines(lambda rank: rank.tokens_masked),
        "counter",
    ),
    Metric(
        "reap_serve_sample_fraction",
        "Probability with which a token is recorded.",
        _over_engines(lambda rank: rank.sample_fraction, min),
    ),
    Metric(
        "reap_serve_recorder_overhead_fraction",
        "Share of the engine's busy time that recording took, since the start.",
        _overhead,
    ),
    Metric(
        "reap_serve_recorder_seconds",
        "Time that recording took.",
        _over_engines(lambda rank: rank.recorder_seconds),
        "counter",
    ),
    Metric(
        "reap_serve_busy_seconds",
        "Time of the engine's steps.",
        _over_engines(lambda rank: rank.busy_seconds),
        "counter",
    ),
    Metric(
        "reap_serve_recorder_failures",
        "Failures that stopped recording or lost a window.",
        _over_ranks(lambda rank: rank.failures),
        "counter",
    ),
    Metric(
        "reap_serve_statistics_incomplete",
        "1 when tokens were lost since the last reset.",
        _over_ranks(lambda rank: float(not rank.complete)),
    ),
    Metric("reap_serve_flush_age_seconds", "Time since the last statistics file.", _flush_age),
    Metric(
        "reap_serve_files_written",
        "Statistics files written.",
        _over_ranks(lambda rank: rank.writer.files_written if rank.writer else None),
        "counter",
    ),
    Metric(
        "reap_serve_flush_failures",
        "Statistics files that could not be written.",
        _over_ranks(lambda rank: rank.writer.write_failures if rank.writer else None),
        "counter",
    ),
    Metric(
        "reap_serve_tokens_pending",
        "Tokens recorded and not yet in a file: a write failed, or their slice is below the minimum.",
        _over_ranks(lambda rank: rank.writer.tokens_pending if rank.writer else None),
    ),
    Metric(
        "reap_serve_experts_unseen",
        "Experts of all layers without a recorded token.",
        lambda reading: iter([((), float(sum(layer.unseen for layer in reading.layers)))]),
    ),
    Metric(
        "reap_serve_load_balance_jain",
        "Jain's index of the experts' token counts, mean over the layers: 1 when all are used alike.",
        _load_balance,
    ),
    Metric(
        "reap_serve_plan_active",
        "1 for the plan of requests that choose none, 0 for the other loaded ones.",
        _plan_active,
        labels=("plan",),
    ),
    Metric(
        "reap_serve_dropped_gate_mass_fraction",
        "Share of the full router's gate weights on dropped experts; plan is empty on a pruned checkpoint.",
        _dropped,
        labels=("plan", "slice"),
    ),
    Metric(
        "reap_serve_dropped_gate_mass_planned_fraction",
        "The same, as the plan's statistics predicted it.",
        _planned,
        labels=("plan", "slice"),
    ),
    Metric("reap_serve_weights_bytes", "Memory of the weights.", _over_ranks(lambda rank: rank.weights_bytes)),
    Metric("reap_serve_kv_cache_capacity_tokens", "Tokens that the KV cache holds.", _kv_cache),
    Metric(
        "reap_serve_build_info",
        "What runs.",
        lambda reading: iter([(reading.build, 1.0)]),
        labels=("version", "vllm", "model"),
    ),
)


class Exporter:
    """Sets the metrics of the table from readings.

    Args:
        registry: Where they are registered.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._counted: dict[tuple[str, Labels], float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        for metric in TABLE:
            if metric.kind == "counter":
                self._counters[metric.name] = Counter(metric.name, metric.help, metric.labels, registry=registry)
            else:
                self._gauges[metric.name] = Gauge(
                    metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode="mostrecent"
                )

    def export(self, reading: Reading) -> None:
        """Sets every metric; a counter never goes back."""
        for metric in TABLE:
            for labels, value in metric.read(reading):
                if metric.kind == "counter":
                    last = self._counted.get((metric.name, labels), 0.0)
                    self._counted[metric.name, labels] = max(value, last)
                    counter = self._counters[metric.name]
                    (counter.labels(*labels) if labels else counter).inc(max(value - last, 0.0))
                else:
                    gauge = self._gauges[metric.name]
                    (gauge.labels(*labels) if labels else gauge).set(value)
