"""A base model of a few hundred bytes, statistics of it, and engines that are played: everything else is real."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import small_checkpoint
import small_report
from statistics_factory import header, window

from reap_serve.compare.record import CandidateReport, Report
from reap_serve.compare.run import Comparison
from reap_serve.cycle import steps
from reap_serve.model import fingerprint, open_model
from reap_serve.plan.record import Plan
from reap_serve.prune.manifest import read_manifest
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.record import ExpertSums, Statistics

HEAVY = 400
LIGHT = 100


@dataclass
class World:
    """One operator's directories, and what the engines were asked."""

    root: Path
    damage: float = 0.01
    engine_calls: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.root / "cycle.toml"

    @property
    def state(self) -> Path:
        return self.root / "state"

    def write_config(self, extra: str = "", gate: str = "slices.*.quality.kl_divergence_mean<0.2") -> None:
        self.config.write_text(
            f"""
model = "base"
state = "state"
served = "served"
[statistics]
paths = ["stats"]
since = "7d"
min_tokens = 500
[traffic]
heldout = ["heldout.jsonl"]
[choose]
keep_experts = 2
[gates]
trial = ["{gate}"]
{extra}
"""
        )

    def observe(self, name: str, favourites: Sequence[int], days_ago: float = 0.1, model: Path | None = None) -> Path:
        """One window in which these experts are used four times as often, with four times the saliency."""
        marks = fingerprint(open_model(str(model or self.root / "base")))
        counts_E = np.array([HEAVY if expert in favourites else LIGHT for expert in range(4)])
        sums = ExpertSums.zeros(1, 2, 4)
        counts = np.broadcast_to(counts_E, (2, 4))
        gate, norm = 0.5, np.where(counts == HEAVY, 4.0, 1.0)
        sums.token_count_SPLE[0, 1] = counts
        sums.gate_sum_SPLE[0, 1] = gate * counts
        sums.norm_sum_SPLE[0, 1] = norm * counts
        sums.norm_sq_sum_SPLE[0, 1] = norm**2 * counts * 1.01
        sums.weighted_norm_sum_SPLE[0, 1] = gate * norm * counts
        sums.weighted_norm_sq_sum_SPLE[0, 1] = (gate * norm) ** 2 * counts * 1.01
        sums.norm_max_SPLE[0, 1] = norm
        sums.activation_max_SPLE[0, 1] = norm
        layer_tokens = np.zeros((1, 2, 2), np.int64)
        layer_tokens[0, 1] = counts_E.sum() // 2
        ended = datetime.now(UTC) - timedelta(days=days_ago)
        started = (ended - timedelta(minutes=5)).isoformat()
        of = window(
            name,
            started=started,
            ended=ended.isoformat(),
            recorder="deferred",
            requests=9,
            prompt_tokens=(100, 100),
        )
        path = self.root / "stats" / f"{name}.safetensors"
        write_statistics(Statistics(header(marks, of=of), sums, layer_tokens), str(path), overwrite=False)
        return path

    def switch(self, candidate: str) -> None:
        """What an operator does: the link names what is served."""
        link = self.root / "served"
        link.unlink(missing_ok=True)
        link.symlink_to(candidate)


def report_of(base: str, candidate: str, damage: float, plans: Mapping[str, float]) -> Report:
    """A report on one slice with a mean divergence of so many nats."""
    made = small_report.small_report(("default",))
    slices = {
        "default": made.slices["default"].model_copy(update={"quality": small_report.small_quality(damage / 0.4)})
    }
    candidates = tuple(
        CandidateReport(
            name=name,
            virtual=True,
            experts_kept=2,
            weights_bytes=10,
            slices={"default": small_report.small_quality(value / 0.4)},
        )
        for name, value in plans.items()
    )
    return made.model_copy(update={"base": base, "candidate": candidate, "slices": slices, "candidates": candidates})


def made_up_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A base model, a held-out request, and engines that are played."""
    tmp_path.mkdir(exist_ok=True)
    made = World(tmp_path)
    small_checkpoint.write_checkpoint(tmp_path / "base")
    (tmp_path / "stats").mkdir()
    request = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}], "model": "m"}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(request) + "\n")
    made.write_config()

    def sweep(base: str, plans: Mapping[str, Plan], *_: object) -> Comparison:
        made.engine_calls.append("sweep")
        damages = {name: made.damage if name == steps.NEW else 1.0 for name in plans}
        return Comparison(report_of(base, steps.NEW, made.damage, damages), {})

    def compare(base: str, candidate: str, *_: object) -> Comparison:
        made.engine_calls.append("compare")
        return Comparison(report_of(base, candidate, made.damage, {}), {})

    monkeypatch.setattr(steps, "sweep", sweep)
    monkeypatch.setattr(steps, "compare", compare)
    return made


def kept(candidate: str | None) -> tuple[int, ...]:
    """The experts that a candidate keeps in its first layer."""
    assert candidate is not None
    return read_manifest(Path(candidate)).plan.layers[0].kept
