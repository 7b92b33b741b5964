"""TUNED.md and tuned.json from what `tuned` measured.

Run: ``python -m bench.paper.tuned_report [--work DIR]``; takes every ``tuned-NAME.jsonl`` that is there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench.paper.traffic import MIXTURE

Line = Mapping[str, Any]


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--output", type=Path, default=Path("bench/paper"))
    arguments = parser.parse_args()
    found = {
        path.stem.removeprefix("tuned-"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(arguments.work.glob("tuned-*.jsonl"))
    }
    # Divergences of single requests stay out: they fill pages, and the guard's differences are made of them.
    kept = {
        name: [{key: value for key, value in line.items() if key != "requests"} for line in lines]
        for name, lines in found.items()
    }
    text = json.dumps(kept, separators=(",", ":")).replace('{"setting"', '\n{"setting"')
    (arguments.output / "tuned.json").write_text(text + "\n")
    (arguments.output / "TUNED.md").write_text("\n".join(_tables(found)) + "\n")


def _tables(found: Mapping[str, Sequence[Line]]) -> list[str]:
    text = [
        "# What `tune` picks, against REAP at equal size",
        "",
        "KL of the base from the pruned model on held-out answers, over REAP's of the same calibration sample:",
        "geometric mean over the samples with its paired 95 % interval (Student's t on the logarithms); below 1 is",
        "better. Mixture: 13 requests of each domain a sample, no request in two samples, mean over the domains. Own",
        "domain: 40 requests, measured on it; three samples that share no request, and three more of another order. Of",
        "seven requests five are observed and two choose, by the guard of `reap_serve/tune/guard.py`. Made by",
        "`python -m bench.paper.tuned` and `tuned_report`; figures of every run: `tuned.json`.",
    ]
    for name, lines in found.items():
        for is_mixture in (True, False):
            for sparsity in sorted({line["setting"]["sparsity"] for line in lines}):
                some = [
                    line
                    for line in lines
                    if line["setting"]["sparsity"] == sparsity and (line["setting"]["source"] == MIXTURE) == is_mixture
                ]
                if some:
                    text += ["", *_table(name, "mixture" if is_mixture else "own domain", sparsity, some)]
    return text


def _table(name: str, calibration: str, sparsity: float, lines: Sequence[Line]) -> list[str]:
    reap = np.array([line["kl"]["reap"] for line in lines])
    chosen = Counter(line["chosen"] for line in lines)
    tokens = np.mean([line["masked_tokens"] for line in lines])
    rows = []
    names = list(lines[0]["kl"])
    # Rounds in their order, `tune` last, whatever order they were noted in.
    names.sort(key=lambda name: (name == "tune", name if name.startswith("trials") else ""))
    for rule in names:
        if all(rule in line["kl"] for line in lines):
            ratio = np.array([line["kl"][rule] for line in lines]) / reap
            rows.append((rule, _geometric(ratio), float(np.mean([line["kl"][rule] for line in lines])), ratio.max()))
    return [
        f"## {name}, {calibration}, {sparsity:.0%} of the experts gone: {len(lines)} samples",
        "",
        "| rule | KL over REAP's | KL, nats | mean KL over REAP's | worst sample |",
        "|---|---|---|---|---|",
        *(
            f"| {rule} | {ratio} | {mean:.3f} | {mean / reap.mean():.2f} | {worst:.2f} |"
            for rule, ratio, mean, worst in rows
        ),
        "",
        f"`tune` chose {', '.join(f'{rule} {_times(count)}' for rule, count in chosen.most_common())}; "
        f"{tokens:,.0f} masked tokens a sample.",
        *([] if calibration == "mixture" else _by_domain(lines)),
    ]


def _by_domain(lines: Sequence[Line]) -> list[str]:
    """Where the gain is: KL of REAP, `asq` and the choice by domain."""
    rows = ["", "| domain | KL of reap | KL of asq | KL of tune | asq chosen |", "|---|---|---|---|---|"]
    for domain in dict.fromkeys(line["setting"]["source"] for line in lines):
        some = [line for line in lines if line["setting"]["source"] == domain]
        means = (float(np.mean([line["kl"][rule] for line in some])) for rule in ("reap", "asq", "tune"))
        chosen = sum(line["chosen"] == "asq" for line in some)
        rows.append(f"| {domain} | {' | '.join(f'{mean:.4f}' for mean in means)} | {chosen} of {len(some)} |")
    return rows


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _geometric(ratio_S: np.ndarray) -> str:
    logs = np.log(ratio_S)
    mean = math.exp(float(logs.mean()))
    # Of two samples Student's t says nothing.
    if len(logs) < 3:
        return f"{mean:.2f}"
    half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return f"{mean:.2f} ({mean * math.exp(-half):.2f} to {mean * math.exp(half):.2f})"


if __name__ == "__main__":
    main()
