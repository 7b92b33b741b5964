"""The tables of a report with one line a slice: recorded answers, greedy answers, and llama.cpp's names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reap_serve.compare.record import Quality, Report, SliceReport
from reap_serve.compare.section import Cell, Row, Section
from reap_serve.compare.verdict import Judgement, SliceVerdict

FEW_REQUESTS = "few requests"


def token_rows(report: Report, verdicts: dict[str, SliceVerdict]) -> list[Row]:
    """Figures of the recorded answers, teacher-forced."""
    return [
        Row(name, verdicts[name].level, _token_cells(entry, verdicts[name])) for name, entry in report.slices.items()
    ]


def _token_cells(entry: SliceReport, verdict: SliceVerdict) -> tuple[Cell, ...]:
    quality = entry.quality
    levels = {judgement.limit.name: judgement.level for judgement in verdict.judgements}
    return (
        _figure(entry, "KL divergence, mean", "kl_divergence_mean", ".4f", levels["kl_divergence_mean"]),
        _figure(entry, "KL 99 %", "kl_divergence_p99", ".3f"),
        _figure(entry, "Perplexity ratio", "perplexity_ratio", ".3f", levels["perplexity_ratio"]),
        Cell(
            "Perplexity",
            f"{quality.perplexity_base:.3f} → {quality.perplexity_candidate:.3f}",
            noise="" if entry.noise_floor is None else f"{entry.noise_floor.perplexity_candidate:.3f}",
            mark=_mark(quality, "perplexity_base", "perplexity_candidate"),
        ),
        _figure(entry, "Same top token", "same_top_token_fraction", ".1%"),
        _figure(entry, "RMS Δp", "rms_delta_p", ".1%"),
        Cell("Tokens", f"{quality.tokens:,}", f"{quality.requests:,} requests"),
    )


def _figure(entry: SliceReport, label: str, name: str, form: str, level: str | None = None) -> Cell:
    """A figure with its interval and, beside it, the same of the base twice."""
    value = getattr(entry.quality, name)
    if value is None:
        return Cell(label, "–")
    noise = None if entry.noise_floor is None else getattr(entry.noise_floor, name)
    interval = _interval(entry.quality, name, form)
    return Cell(
        label,
        f"{value:{form}}",
        interval,
        level,
        "" if noise is None else f"{noise:{form}}",
        _mark(entry.quality, name),
    )


def answer_rows(report: Report, verdicts: dict[str, SliceVerdict]) -> list[Row]:
    """Shares of greedy answers; a share that no slice has is left out."""
    if not any(entry.quality.answers for entry in report.slices.values()):
        return []
    pairs = [
        (label, name)
        for label, name in (
            ("End in a loop", "loop_fraction"),
            ("Cut at the longest length", "length_limit_fraction"),
            ("Empty", "empty_fraction"),
            ("In another language", "language_switch_fraction"),
            ("Valid JSON", "json_valid_fraction"),
            ("Valid tool calls", "tool_call_valid_fraction"),
        )
        if any(getattr(entry.quality, f"{name}_base") is not None for entry in report.slices.values())
    ]
    return [
        Row(
            name,
            verdicts[name].level,
            (
                Cell("Answers", str(entry.quality.answers)),
                _figure(entry, "The same, token for token", "same_answer_fraction", ".0%"),
                _figure(entry, "Tokens before they part", "first_divergence_mean", ".1f"),
                *(_share_pair(entry, label, figure, verdicts[name].judgements) for label, figure in pairs),
            ),
        )
        for name, entry in report.slices.items()
    ]


def _share_pair(entry: SliceReport, label: str, name: str, judgements: Sequence[Judgement]) -> Cell:
    quality = entry.quality
    base, candidate = getattr(quality, f"{name}_base"), getattr(quality, f"{name}_candidate")
    if base is None or candidate is None:
        return Cell(label, "–")
    level = next((judgement.level for judgement in judgements if judgement.limit.name == name), None)
    noise = None if entry.noise_floor is None else getattr(entry.noise_floor, f"{name}_candidate")
    interval = _interval(quality, f"{name}_candidate", ".0%")
    return Cell(label, f"{base:.0%} → {candidate:.0%}", interval, level, "" if noise is None else f"{noise:.0%}")


def _interval(quality: Quality, name: str, form: str) -> str:
    ends = quality.intervals.get(name)
    return "" if ends is None else f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _mark(quality: Quality, *names: str) -> str:
    return FEW_REQUESTS if set(names) & set(quality.few_requests) else ""


def few_requests_note(report: Report) -> str:
    """What the mark of an interval says; empty where none is marked."""
    if not any(entry.quality.few_requests for entry in report.slices.values()):
        return ""
    return (
        f"“{FEW_REQUESTS.capitalize()}”: the figure rests on few of the slice's requests, and its interval may miss "
        "more often than 1 time in 20: there are fewer than 25 g², g the skewness of what each adds to the figure."
    )


def llama_cpp_section(report: Report) -> Section:
    """The same figures by the names of llama.cpp's perplexity report; Q is the candidate there, the quantised model."""
    rows = tuple(Row(name, None, _llama_cpp_cells(entry.quality)) for name, entry in report.slices.items())
    note = (
        "As `llama-perplexity --kl-divergence` prints them. ± is half the 95 % interval by bootstrap over requests, "
        "where llama.cpp prints one standard error over tokens. KLD is a lower bound here, exact there."
    )
    return Section("In the names of llama.cpp", rows, (note,))


def _llama_cpp_cells(quality: Quality) -> tuple[Cell, ...]:
    low, high = quality.intervals.get("perplexity_ratio", (math.nan, math.nan))
    half = (math.log(high) - math.log(low)) / 2.0 if low > 0.0 else math.nan
    log_ratio = f"{math.log(quality.perplexity_ratio):.4f}"
    plus_minus = "" if math.isnan(half) else f"± {half:.4f}"
    return (
        _plus_minus(quality, "Mean PPL(Q)", "perplexity_candidate", ".3f"),
        _plus_minus(quality, "Mean PPL(base)", "perplexity_base", ".3f"),
        Cell("Mean ln(PPL(Q)/PPL(base))", log_ratio, plus_minus, mark=_mark(quality, "perplexity_ratio")),
        _plus_minus(quality, "Mean KLD", "kl_divergence_mean", ".4f"),
        Cell("Maximum KLD", f"{quality.kl_divergence_max:.3f}"),
        Cell("99.9% KLD", f"{quality.kl_divergence_p999:.3f}"),
        Cell("99.0% KLD", f"{quality.kl_divergence_p99:.3f}"),
        Cell("90.0% KLD", f"{quality.kl_divergence_p90:.3f}"),
        Cell("Median KLD", f"{quality.kl_divergence_median:.4f}"),
        _plus_minus(quality, "Mean Δp", "mean_delta_p", ".2%"),
        _plus_minus(quality, "RMS Δp", "rms_delta_p", ".2%"),
        _plus_minus(quality, "Same top p", "same_top_token_fraction", ".2%"),
    )


def _plus_minus(quality: Quality, label: str, name: str, form: str) -> Cell:
    ends = quality.intervals.get(name)
    plus_minus = "" if ends is None else f"± {(ends[1] - ends[0]) / 2:{form}}"
    return Cell(label, f"{getattr(quality, name):{form}}", plus_minus, mark=_mark(quality, name))
