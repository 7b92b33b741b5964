"""Plans for tiny checkpoints, and the base and pruned models that they make."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reap_serve.architectures.resolve import resolve
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import PruneResult, prune
from reap_serve.records import read_json_object

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 2)


@dataclass(frozen=True, slots=True)
class Pair:
    """A checkpoint and what became of it.

    Attributes:
        base: The source.
        pruned: The output.
        plan: The plan's file.
        kept: Kept experts by layer.
        dropped: Dropped experts by layer.
        result: What `prune` reported.
    """

    base: Path
    pruned: Path
    plan: Path
    kept: Mapping[int, Sequence[int]]
    dropped: Mapping[int, Sequence[int]]
    result: PruneResult


def random_kept(base: Path, fraction_dropped: float, seed: int = 0) -> dict[int, list[int]]:
    """A different random choice for every layer, with equal numbers in each group."""
    config = read_json_object(base / "config.json")
    limits = resolve(config).limits(config)
    draw = random.Random(seed)
    size = limits.num_experts // limits.num_groups
    stay = round(size * (1 - fraction_dropped))
    return {
        layer: sorted(
            group * size + expert for group in range(limits.num_groups) for expert in draw.sample(range(size), stay)
        )
        for layer in limits.moe_layers
    }


def write_plan(path: Path, kept: Mapping[int, Sequence[int]], num_experts: int) -> Path:
    """A hand-written plan."""
    layers = [
        {
            "layer": f"model.layers.{index}.mlp.experts",
            "index": index,
            "kept": list(ids),
            "dropped": [expert for expert in range(num_experts) if expert not in ids],
        }
        for index, ids in kept.items()
    ]
    path.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}))
    return path


def make_pair(
    base: Path, folder: Path, fraction_dropped: float, num_experts: int = 8, options: PruneOptions = OPTIONS
) -> Pair:
    """Prunes a checkpoint by a random plan."""
    kept = random_kept(base, fraction_dropped)
    dropped = {layer: [each for each in range(num_experts) if each not in ids] for layer, ids in kept.items()}
    plan = write_plan(folder / "plan.json", kept, num_experts)
    result = prune(str(base), plan, folder / "pruned", options, overwrite=False)
    return Pair(base, result.output, plan, kept, dropped, result)
