"""How often the 95 % intervals of `compare` hold the value that they are an interval of.

Theory. All requests of a slice are taken for the population: their figure is the truth. A resample of n requests,
drawn from them with replacement, is what a user with less traffic would have; its interval should hold the truth 95
times in 100. With D draws the fraction that does has the standard error sqrt(0.95 * 0.05 / D), 1.5 % for D = 200: 92 %
to 98 % is two of them either way. No interval can cover what a resample does not hold: a quantile in the tail of few
tokens, or a mean that rests on one request of the population, such as the perplexity of a model that is right all but
once. Such figures are shown too.

    python bench/compare_coverage.py BASE CANDIDATE TRAFFIC... [--requests 60] [--draws 200] [--server-args "..."]

BASE and CANDIDATE are what `reap-serve compare` takes. Every TRAFFIC file is scored once with both models.

Output: one JSON document on stdout: {"requests": n, "draws": D, "population": {slice: requests},
"coverage": {slice: {figure: fraction}}, "mean": {figure: fraction}}; a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys

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


def coverage(
    base: list[TokenScores], candidate: list[TokenScores], requests: int, draws: int, seed: int
) -> dict[str, float]:
    """Fraction of draws whose interval holds the figure of all requests."""
    truth = quality(base, candidate)
    generator = np.random.default_rng(seed)
    hits = dict.fromkeys(FIGURES, 0)
    for _ in range(draws):
        drawn = generator.integers(len(base), size=requests).tolist()
        sample = quality([base[index] for index in drawn], [candidate[index] for index in drawn])
        for figure in FIGURES:
            low, high = sample.intervals[figure]
            hits[figure] += low <= getattr(truth, figure) <= high
    return {figure: count / draws for figure, count in hits.items()}


def main() -> None:
    """Scores the traffic with both models and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("candidate")
    parser.add_argument("traffic", nargs="+")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--draws", type=int, default=200)
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
    population: dict[str, int] = {}
    found: dict[str, dict[str, float]] = {}
    for seed, name in enumerate(sorted({case.slice for case in cases.forced})):
        members = [index for index, case in enumerate(cases.forced) if case.slice == name]
        population[name] = len(members)
        found[name] = coverage(
            [of_base[index] for index in members],
            [of_candidate[index] for index in members],
            arguments.requests,
            arguments.draws,
            seed,
        )
    mean = {figure: float(np.mean([slice[figure] for slice in found.values()])) for figure in FIGURES}
    for figure in FIGURES:
        cells = "  ".join(f"{name} {found[name][figure]:.1%}" for name in found)
        print(f"{figure:26} {mean[figure]:6.1%}   {cells}", file=sys.stderr)
    document = {
        "requests": arguments.requests,
        "draws": arguments.draws,
        "population": population,
        "coverage": found,
        "mean": mean,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
