"""The functional subspace of experts whose mean outputs are worked by hand."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_report import small_report
from statistics_factory import fingerprint, header

from reap_serve.compare.subspace import (
    ORIGINAL,
    MergeBound,
    analyse_subspace,
    participation,
    read_subspace,
    spread,
)
from reap_serve.compare.subspace_figures import drawn_layers, subspace_section
from reap_serve.errors import InputFileError, MismatchError, RequestError
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.record import ExpertSums, Statistics

# A cross: two experts far apart on one axis, two nearer on another.
CROSS = [[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]]


def observed(means: list[list[float]], counts: list[int] | None = None, layers: int = 1) -> Statistics:
    """Statistics in which each expert's mean output is as given, in every layer."""
    num_experts = len(means)
    counts = counts or [2] * num_experts
    sums = ExpertSums.zeros(1, layers, num_experts)
    sums.token_count_SPLE[0, 0] = counts
    output = np.zeros((1, 2, layers, num_experts, len(means[0])))
    output[0, 0] = np.array(means) * np.array(counts)[:, None]
    model = fingerprint(layers, num_experts, 1, dtype="float32")
    tokens = np.full((1, 2, layers), sum(counts))
    return Statistics(header(model), dataclasses.replace(sums, output_sum_SPLEH=output), tokens)


def test_spread_and_directions_of_a_cross() -> None:
    # Squared distances 9, 9, 1, 1; eigenvalues 18 and 2: 20^2 / (324 + 4).
    assert spread(np.array(CROSS)) == 5.0
    assert participation(np.array(CROSS)) == pytest.approx(400 / 328)
    assert participation(np.eye(4)) == pytest.approx(3.0)
    assert participation(np.ones((3, 2))) == 0.0


def test_pruning_keeps_points_and_merging_draws_them_in() -> None:
    # Pruned: the far pair stays. Merged: each far expert with a near one, halfway.
    merged = [[1.5, 0.5, 0.0], [-1.5, -0.5, 0.0]]
    found = analyse_subspace(observed(CROSS), {"pruned": observed(CROSS[:2]), "merged": observed(merged)})
    (layer,) = found.layers
    assert [model.name for model in layer.models] == [ORIGINAL, "pruned", "merged"]
    assert layer.explained == pytest.approx((0.9, 0.1))
    original, pruned, _ = layer.models
    np.testing.assert_allclose(np.abs(original.points), np.abs(np.array(CROSS)[:, :2]), atol=1e-9)
    assert set(pruned.points) == set(original.points[:2])
    assert found.ratio("pruned", "spread") == pytest.approx((9 / 5,))
    assert found.ratio("merged", "spread") == pytest.approx((2.5 / 5,))


def test_experts_without_tokens_are_no_points() -> None:
    found = analyse_subspace(observed([*CROSS, [100.0, 100.0, 100.0]], [2, 2, 2, 2, 0]), {})
    assert len(found.layers[0].models[0].points) == 4
    assert found.layers[0].models[0].spread == 5.0


def test_what_cannot_be_analysed_is_refused() -> None:
    without = dataclasses.replace(observed(CROSS), sums=ExpertSums.zeros(1, 1, 4))
    with pytest.raises(RequestError, match=r"statistics of original lack output_sum; observe with --extra-sum"):
        analyse_subspace(without, {})
    with pytest.raises(RequestError, match=r"original has 1 experts with tokens"):
        analyse_subspace(observed(CROSS, [1, 0, 0, 0]), {})
    with pytest.raises(MismatchError, match=r"other has layers 0\.\.1 of width 3, the original 0\.\.0"):
        analyse_subspace(observed(CROSS), {"other": observed(CROSS, layers=2)})


def test_a_file_comes_back(tmp_path: Path) -> None:
    bound = MergeBound(layer=0, experts=(1, 2), bound=0.5, ideal=0.6, measured=0.7, pruned=0.2, method="hc-smoe")
    made = analyse_subspace(observed(CROSS), {}).model_copy(update={"bounds": (bound,)})
    (tmp_path / "s.json").write_text(made.model_dump_json())
    assert read_subspace(tmp_path / "s.json") == made
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(InputFileError):
        read_subspace(tmp_path / "wrong.json")


def test_the_section_says_what_it_draws() -> None:
    pytest.importorskip("plotly")
    bound = MergeBound(layer=0, experts=(1, 2), bound=0.5, ideal=0.6, measured=0.7, pruned=0.2, method="hc-smoe")
    made = analyse_subspace(observed(CROSS, layers=2), {"mer<ged": observed(CROSS[:2], layers=2)})
    plain = small_report()
    assert subspace_section(plain) is None
    section = subspace_section(plain.model_copy(update={"subspace": made.model_copy(update={"bounds": (bound,)})}))
    assert section is not None
    assert [row.name for row in section.rows] == ["0", "1"]
    assert [cell.text for cell in section.rows[0].cells] == ["1.2", "1.80"]
    assert len(section.plots) == 2
    assert "mer&lt;ged" in section.plots[0].html
    assert "mer<ged" not in section.plots[0].html.replace("mer\\u003cged", "")


def test_layers_are_drawn_from_first_to_last() -> None:
    assert drawn_layers(1) == [0]
    assert drawn_layers(4) == [0, 1, 2, 3]
    assert drawn_layers(48) == [0, 16, 31, 47]


def test_the_command_writes_what_compare_reads(tmp_path: Path) -> None:
    for name, means in (("a", CROSS), ("b", CROSS[:2])):
        write_statistics(observed(means), str(tmp_path / name), overwrite=False)
    command = [sys.executable, "-m", "reap_serve", "stats", "subspace", "a", "pruned=b", "--output", "s.json"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"][0]["models"][1]["name"] == "pruned"
    assert read_subspace(tmp_path / "s.json").ratio("pruned", "spread") == pytest.approx((9 / 5,))
    again = subprocess.run([*command[:-2], "original=b"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "original=b is not NAME=FILE with a name of its own" in again.stderr
