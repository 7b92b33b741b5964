"""How often the 95 % intervals of `compare` hold the value that they are an interval of.

Theory. All requests of a slice are taken for the population: their figure is the truth. A resample of n requests,
drawn from them with replacement, is what a user with less traffic would have; its interval should hold the truth 95
times in 100. With D draws the fraction that does has the standard error sqrt(0.95 * 0.05 / D), 1.5 % for D = 200: 92 %
to 98 % is two of them either way.

No interval can cover what a resample does not hold. Where one of N requests carries the share w of a mean, a resample
of n misses it with the probability (1 - 1 / N)^n, 61 % for n = N / 2; its interval then has to hold 1 / (1 - w) times
the mean of the other requests. The report marks figures that rest on few requests (`bootstrap.rests_on_few`): how often
that is so, and how often intervals without the mark cover, stands beside the coverage of all.

    python bench/compare_coverage.py BASE CANDIDATE TRAFFIC... [--requests 60] [--draws 200] [--seed 0]
        [--server-args "..."]

BASE and CANDIDATE are what `reap-serve compare` takes. Every TRAFFIC file is scored once with both models.

Output: one JSON document on stdout: {"requests": n, "draws": D, "seed": S, "population": {slice: requests},
"largest_share": {slice: w of the base's loss}, "coverage": {slice: {figure: fraction}}, "marked": {slice: {figure:
fraction of draws}}, "mean": {figure: fraction}, "mean_unmarked": {figure: fraction of the intervals without the mark}};
a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np

from reap_serve.compare.measure import CompareSettings, measure, prepare
from reap_serve.compare.quality import quality
from reap_serve.compare.scores import TokenScores
from reap_serve.compare.side import open_side
from reap_serve.traffic.read import read_traffic

FIGURES = (
    "kl_divergence_mean",
    "kl_divergence_median",
    "kl_divergence_p90",
    "kl_divergence_p99",
    "perplexity_base",
    "perplexity_candidate",
    "perplexity_ratio",
    "same_top_token_fraction",
    "mean_delta_p",
    "rms_delta_p",
)


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the draws of one slice, by figure.

    Attributes:
        hits: Intervals that hold the figure of all requests.
        marked: Intervals of figures that rest on few requests.
        marked_hits: Those of them that hold it.
    """

    hits: Counter[str]
    marked: Counter[str]
    marked_hits: Counter[str]


def count(
    base: list[TokenScores], candidate: list[TokenScores], requests: int, draws: int, seed: tuple[int, int]
) -> Counts:
    """Draws from one slice."""
    truth = quality(base, candidate)
    generator = np.random.default_rng(seed)
    counts = Counts(Counter(), Counter(), Counter())
    for _ in range(draws):
        drawn = generator.integers(len(base), size=requests).tolist()
        sample = quality([base[index] for index in drawn], [candidate[index] for index in drawn])
        for figure in FIGURES:
            low, high = sample.intervals[figure]
            hit = low <= getattr(truth, figure) <= high
            counts.hits[figure] += hit
            if figure in sample.few_requests:
                counts.marked[figure] += 1
                counts.marked_hits[figure] += hit
    return counts


def largest_share(scores: list[TokenScores]) -> float:
    """Of the loss of all requests, that of the worst."""
    loss_C = np.array([-score.logprob_N.sum() for score in scores])
    return float(loss_C.max() / loss_C.sum())


def main() -> None:
    """Scores the traffic with both models and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("candidate")
    parser.add_argument("traffic", nargs="+")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="")
    arguments = parser.parse_args()
    settings = CompareSettings(
        server_arguments=tuple(shlex.split(arguments.server_args)), answers_per_slice=0, latency_requests=0
    )
    with open_side(arguments.base, settings.server_arguments) as side:
        cases = prepare(side, list(read_traffic(arguments.traffic)), settings)
        of_base = measure(side, cases, settings, lambda: None).scores
    with open_side(arguments.candidate, settings.server_arguments) as side:
        of_candidate = measure(side, cases, settings, lambda: None).scores
    members: dict[str, list[int]] = {}
    for index, case in enumerate(cases.forced):
        members.setdefault(case.slice, []).append(index)
    found = {
        name: count(
            [of_base[index] for index in members[name]],
            [of_candidate[index] for index in members[name]],
            arguments.requests,
            arguments.draws,
            (arguments.seed, number),
        )
        for number, name in enumerate(sorted(members))
    }
    shares = {name: largest_share([of_base[index] for index in members[name]]) for name in found}
    report(found, {name: len(members[name]) for name in found}, shares, arguments)


def report(
    found: dict[str, Counts], population: dict[str, int], shares: dict[str, float], run: argparse.Namespace
) -> None:
    """Prints the table and the document."""
    covered = {name: {figure: counts.hits[figure] / run.draws for figure in FIGURES} for name, counts in found.items()}
    marked = {name: {figure: counts.marked[figure] / run.draws for figure in FIGURES} for name, counts in found.items()}
    mean = {figure: float(np.mean([fractions[figure] for fractions in covered.values()])) for figure in FIGURES}
    unmarked = {figure: _unmarked(found, figure, run.draws) for figure in FIGURES}
    print("coverage of all intervals, of those without mark, by slice (share with the mark)", file=sys.stderr)
    for figure in FIGURES:
        cells = "  ".join(f"{name} {covered[name][figure]:.1%} ({marked[name][figure]:.0%})" for name in found)
        print(f"{figure:24} {mean[figure]:6.1%} {unmarked[figure]:6.1%}   {cells}", file=sys.stderr)
    document = {
        "requests": run.requests,
        "draws": run.draws,
        "seed": run.seed,
        "population": population,
        "largest_share": shares,
        "coverage": covered,
        "marked": marked,
        "mean": mean,
        "mean_unmarked": unmarked,
    }
    print(json.dumps(document))


def _unmarked(found: dict[str, Counts], figure: str, draws: int) -> float:
    hits = sum(counts.hits[figure] - counts.marked_hits[figure] for counts in found.values())
    return hits / max(sum(draws - counts.marked[figure] for counts in found.values()), 1)


if __name__ == "__main__":
    main()
