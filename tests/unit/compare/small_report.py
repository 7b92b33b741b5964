"""A report whose figures are made up, every kind of them present."""

from __future__ import annotations

from reap_serve.compare.record import (
    CandidateReport,
    ConcurrencyLevel,
    LatencyReport,
    LatencySides,
    Memory,
    MemoryBudget,
    MemorySides,
    Quality,
    Report,
    SliceReport,
    TaskReport,
)
from reap_serve.records import provenance
from reap_serve.traffic.latency import Distribution, Latency


def small_quality(scale: float, intervals: bool = True) -> Quality:
    """Figures that grow with a scale; 1.0 gives a KL divergence of 0.4."""
    divergence = 0.4 * scale
    quality = Quality(
        requests=10,
        tokens=100,
        perplexity_base=5.0,
        perplexity_candidate=5.0 * (1 + scale),
        perplexity_ratio=1 + scale,
        kl_divergence_mean=divergence,
        kl_divergence_median=divergence / 2,
        kl_divergence_p90=2 * divergence,
        kl_divergence_p99=5 * divergence,
        kl_divergence_p999=8 * divergence,
        kl_divergence_max=10 * divergence,
        same_top_token_fraction=1 - 0.2 * scale,
        mean_delta_p=-0.01 * scale,
        rms_delta_p=0.1 * scale,
        answers=8,
        same_answer_fraction=0.5,
        first_divergence_mean=12.5,
        loop_fraction_base=0.0,
        loop_fraction_candidate=0.25 * min(scale, 1.0),
        length_limit_fraction_base=0.5,
        length_limit_fraction_candidate=0.625,
        empty_fraction_base=0.0,
        empty_fraction_candidate=0.0,
        tool_answers=4,
        tool_call_valid_fraction_base=1.0,
        tool_call_valid_fraction_candidate=0.75,
    )
    ends = {
        name: (0.75 * value, 1.25 * value)
        for name in Quality.model_fields
        if isinstance(value := getattr(quality, name), float) and name != "kl_divergence_max"
    }
    return quality.model_copy(update={"intervals": ends if intervals else {}})


def small_latency(concurrency: int, scale: float) -> LatencyReport:
    times = Distribution(mean=0.1 * scale, p50=0.08 * scale, p90=0.15 * scale, p99=0.2 * scale)
    return LatencyReport(
        concurrency=concurrency,
        requests=20,
        failed=0,
        seconds=3.0,
        output_tokens_per_second=100.0 * concurrency / scale,
        goodput_requests_per_second=5.0,
        latency=Latency(ttft=times, itl=times, tpot=times, e2e=times),
    )


def small_report(names: tuple[str, ...] = ("code", "prose"), levels: tuple[int, ...] = (1, 4, 16)) -> Report:
    """Slices of falling damage, the first with a divergence of 0.4."""
    runs = tuple(
        ConcurrencyLevel(concurrency=level, base=small_latency(level, 1.2), candidate=small_latency(level, 1.0))
        for level in levels
    )
    return Report(
        schema_version=1,
        provenance=provenance(("plotly",)),
        base="org/base",
        candidate="org/base-pruned",
        too_long=1,
        slices={
            name: SliceReport(quality=small_quality(10.0**-number), noise_floor=small_quality(0.005))
            for number, name in enumerate(names)
        },
        latency=LatencySides(
            base=runs[0].base if runs else None, candidate=runs[0].candidate if runs else None, levels=runs
        ),
        memory=MemorySides(
            base=Memory(weights_bytes=2000, kv_cache_tokens=100, start_seconds=2.0, resident_bytes=5 << 30),
            candidate=Memory(weights_bytes=1000, kv_cache_tokens=200, start_seconds=1.0),
        ),
    )


def full_report(names: tuple[str, ...] = ("code", "prose")) -> Report:
    """The same with everything that a report may hold."""
    report = small_report(names)
    sides = (report.memory.base, report.memory.candidate)
    base, candidate = (
        side.model_copy(
            update={
                "weights_resident_bytes": side.weights_bytes,
                "kv_cache_bytes": 5000 - (side.weights_bytes or 0),
                "kv_cache_max_concurrency": 2.5,
                "resident_bytes": 5 << 30,
                "peak_resident_bytes": 6 << 30,
            }
        )
        for side in sides
    )
    budget = MemoryBudget(same="memory", size_bytes=5000)
    return report.model_copy(
        update={
            "memory": MemorySides(base=base, candidate=candidate, budget=budget),
            "latency": report.latency.model_copy(update={"driver": "vllm-bench", "objectives": {"ttft": 0.5}}),
            "candidates": tuple(
                CandidateReport(
                    name=f"keep-{experts}",
                    virtual=True,
                    experts_kept=experts,
                    weights_bytes=60 * experts,
                    slices={name: small_quality(10.0**-number * 16.0 / experts) for number, name in enumerate(names)},
                )
                for experts in (16, 24, 8)
            ),
            "tasks": (
                small_task("gsm8k", "exact_match,strict-match", 0.8, (90.0, 105.0)),
                small_task("wikitext", "word_perplexity,none", None, None),
            ),
        }
    )


def small_task(name: str, metric: str, candidate: float | None, interval: tuple[float, float] | None) -> TaskReport:
    """A metric of 0.82 on the base; None gives one without recovery."""
    return TaskReport(
        tool="lm-eval",
        task=name,
        metric=metric,
        items=200,
        base=0.82,
        candidate=candidate or 12.0,
        recovery_percent=None if candidate is None else 100.0 * candidate / 0.82,
        recovery_interval=interval,
        method=None if interval is None else "pairs",
    )
