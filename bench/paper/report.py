"""The table and its figures as files: results.json and TABLE.md."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench.paper.traffic import MIXTURE
from bench.tiny_moe.conversations import DOMAINS

CALIBRATIONS = ("in-domain", "other domain", "mixture")
SCORED = ("tools", "arithmetic")
Line = Mapping[str, Any]


def write_report(lines: Sequence[Line], output: Path, *, seed: int, held_out: Mapping[str, int], requests: int) -> None:
    """Writes both files.

    Args:
        lines: One a method, sparsity, source and sample, with the figures by domain; that of the base among them.
        output: The folder.
        seed: Of the samples and of `random`.
        held_out: Requests by domain.
        requests: Of a calibration sample.
    """
    base = next(line for line in lines if line["method"] == "base")
    lines = [line for line in lines if line["method"] != "base"]
    document = {
        "seed": seed,
        "held_out_requests": dict(held_out),
        "requests_per_sample": requests,
        "base": base["domains"],
        "results": [_rounded(line) for line in sorted(lines, key=_order)],
    }
    (output / "results.json").write_text(
        json.dumps(document, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n"
    )
    (output / "TABLE.md").write_text("\n".join(_tables(lines, base["domains"])) + "\n")


def _order(line: Line) -> tuple[Any, ...]:
    return line["sparsity"], line["method"], line["source"], line["sample"]


def _rounded(line: Line) -> dict[str, Any]:
    domains = {
        domain: {name: float(f"{value:.5g}") for name, value in figures.items()}
        for domain, figures in line["domains"].items()
    }
    return {**line, "domains": domains}


def _tables(lines: Sequence[Line], base: Mapping[str, Mapping[str, float]]) -> list[str]:
    text = [
        "# Methods by sparsity and calibration",
        "",
        "Means over the five domains (exact match: over tools and arithmetic), with 95 % intervals (Student's t) over",
        "the calibration samples. Perplexity ratio is the geometric mean of the domains' ratios to the base.",
        "Made by `python -m bench.paper`; figures of every run in `results.json`.",
    ]
    for sparsity in sorted({line["sparsity"] for line in lines}):
        for calibration in CALIBRATIONS:
            text += ["", f"## {sparsity:.0%} of the experts gone, calibration: {calibration}", ""]
            text += ["| method | perplexity ratio | KL, nats | same top token | exact match | samples |"]
            text += ["|---|---|---|---|---|---|"]
            rows = _rows(lines, sparsity, calibration, base)
            text += [row for _, row in sorted(rows)]
    for sparsity in sorted({line["sparsity"] for line in lines}):
        text += [
            "",
            f"## By domain: {sparsity:.0%} gone, KL in nats (exact match), calibration in-domain / mixture",
            "",
        ]
        text += [f"| method | {' | '.join(DOMAINS)} |", f"|---{'|---' * len(DOMAINS)}|"]
        text += _domain_rows(lines, sparsity)
    return text


def _samples(
    lines: Sequence[Line], method: str, sparsity: float, calibration: str
) -> list[dict[str, list[Mapping[str, float]]]]:
    """By sample: the figures of each held-out domain under the sources of a calibration; samples with all domains."""
    found: defaultdict[int, dict[str, list[Mapping[str, float]]]] = defaultdict(lambda: {each: [] for each in DOMAINS})
    for line in lines:
        if (line["method"], line["sparsity"]) != (method, sparsity):
            continue
        for domain in DOMAINS:
            is_mine = {
                "in-domain": line["source"] == domain,
                "other domain": line["source"] not in (domain, MIXTURE),
                "mixture": line["source"] == MIXTURE,
            }[calibration]
            # Random choice looks at no traffic: it is the same under every calibration.
            if is_mine or method == "random":
                found[line["sample"]][domain].append(line["domains"][domain])
    whole = (found[sample] for sample in sorted(found))
    return [sample for sample in whole if all(sample.values())]


def _summary(
    samples: Sequence[dict[str, list[Mapping[str, float]]]], base: Mapping[str, Mapping[str, float]]
) -> dict[str, list[float]]:
    """By figure: one value a sample."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        ratios = [
            np.mean([math.log(each["perplexity"] / base[domain]["perplexity"]) for each in figures])
            for domain, figures in sample.items()
        ]
        found["ratio"].append(math.exp(float(np.mean(ratios))))
        for name in ("kl", "agreement"):
            values = [np.mean([each[name] for each in figures]) for figures in sample.values()]
            found[name].append(float(np.mean(values)))
        found["exact"].append(
            float(np.mean([np.mean([each["exact"] for each in sample[domain]]) for domain in SCORED]))
        )
    return found


def _rows(
    lines: Sequence[Line], sparsity: float, calibration: str, base: Mapping[str, Mapping[str, float]]
) -> list[tuple[float, str]]:
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        samples = _samples(lines, method, sparsity, calibration)
        if not samples:
            continue
        found = _summary(samples, base)
        cells = [
            _cell(found["ratio"], ".3f"),
            _cell(found["kl"], ".3f"),
            _cell(found["agreement"], ".1%"),
            _cell(found["exact"], ".1%"),
            str(len(samples)),
        ]
        rows.append((float(np.mean(found["kl"])), f"| {method} | {' | '.join(cells)} |"))
    return rows


def _cell(values: Sequence[float], form: str) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:{form}}"
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return f"{mean:{form}} ± {half:{form}}"


def _domain_rows(lines: Sequence[Line], sparsity: float) -> list[str]:
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        cells = []
        for domain in DOMAINS:
            parts = []
            for calibration in ("in-domain", "mixture"):
                samples = _samples(lines, method, sparsity, calibration)
                if not samples:
                    parts.append("–")
                    continue
                kl = np.mean([np.mean([each["kl"] for each in sample[domain]]) for sample in samples])
                exact = np.mean([np.mean([each["exact"] for each in sample[domain]]) for sample in samples])
                parts.append(f"{kl:.3f}" + (f" ({exact:.0%})" if domain in SCORED else ""))
            cells.append(" / ".join(parts))
        rows.append(f"| {method} | {' | '.join(cells)} |")
    return rows
