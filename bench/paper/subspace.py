"""The functional subspace of the original, pruned and merged model, and the bound on the error of merging.

Run: ``python -m bench.paper.subspace`` (under a minute). Groups and kept experts come from a calibration sample of the
mixture; the outputs are observed on held-out traffic. Writes ``bench/paper/SUBSPACE.md`` and, for `reap-serve compare
--subspace`, ``build/paper/subspace.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.paper.bounds import merge_bounds
from bench.paper.collect import collect
from bench.paper.methods import changed_layers
from bench.paper.network import Network
from bench.paper.run import HELD_OUT, NUM_SAMPLES, REQUESTS_PER_SAMPLE, SEED
from bench.paper.traffic import MIXTURE, calibration_samples, read_sequences
from reap_serve.compare.subspace import MergeBound, Subspace, analyse_subspace

MODELS = ("reap", "frequency", "m-smoe", "hc-smoe", "ream")
MERGED = ("m-smoe", "hc-smoe", "ream")
KEEP = 16


def main() -> None:
    """Analyses and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefacts", type=Path, default=Path("reap_serve/demo/tiny_moe"))
    parser.add_argument("--output", type=Path, default=Path("bench/paper"))
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    network = Network(arguments.artefacts / "model")
    held = read_sequences(arguments.artefacts, "heldout")
    traffic = [each for domain, count in HELD_OUT.items() for each in held[domain][:count]]
    samples = calibration_samples(
        read_sequences(arguments.artefacts, "calibration"), NUM_SAMPLES, REQUESTS_PER_SAMPLE, SEED
    )
    calibrated = collect(network, samples[MIXTURE, 0]).statistics
    original = collect(network, traffic)
    others = {
        name: collect(network, traffic, changed_layers(network, name, calibrated, KEEP, SEED)).statistics
        for name in MODELS
    }
    bounds = [bound for name in MERGED for bound in merge_bounds(network, original, name, KEEP)]
    found = analyse_subspace(original.statistics, others).model_copy(update={"bounds": tuple(bounds)})
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "subspace.json").write_text(found.model_dump_json() + "\n")
    (arguments.output / "SUBSPACE.md").write_text("\n".join(_tables(found)) + "\n")


def _tables(found: Subspace) -> list[str]:
    lines = [f"| layer | original: directions | {' | '.join(MODELS)} |", f"|---|---{'|---' * len(MODELS)}|"]
    for layer in found.layers:
        first, *others = layer.models
        cells = [f"{model.spread / first.spread:.2f} ({model.participation:.1f})" for model in others]
        lines.append(f"| {layer.index} | {first.participation:.1f} | {' | '.join(cells)} |")
    text = [
        "# Functional subspace, half of the experts gone",
        "",
        "Spread of the experts' mean outputs relative to the original's, in brackets the participation ratio",
        "(directions). Held-out traffic of all domains; made by `python -m bench.paper.subspace`.",
        "",
        *lines,
        "",
        "# Error of merging a pair, against its estimated bound",
        "",
        "Ratios to E[(g_i + g_j)²] Var[r] E‖f_i − f_j‖² (median, in brackets 10 % and 90 %), over the pairs that a",
        "method merges into an expert of two. Ideal: the best fixed mixture of both outputs. Merged: the average of",
        "their weights. Pruned: the one of lower saliency is dropped and the router chooses anew.",
        "",
        "| method | pairs | ideal | merged | pruned | merged worse than pruned |",
        "|---|---|---|---|---|---|",
    ]
    for method in MERGED:
        mine = [bound for bound in found.bounds if bound.method == method and bound.bound > 0]
        if mine:
            worse = np.mean([bound.measured > bound.pruned for bound in mine])
            cells = [_ratios(mine, field) for field in ("ideal", "measured", "pruned")]
            text.append(f"| {method} | {len(mine)} | {' | '.join(cells)} | {worse:.0%} |")
    return text


def _ratios(bounds: Sequence[MergeBound], field: str) -> str:
    low, middle, high = np.quantile([getattr(bound, field) / bound.bound for bound in bounds], [0.1, 0.5, 0.9])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
