"""Exchange with llm-compressor and the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from token_rows import fingerprint, random_tokens, statistics_of

from reap_serve.errors import InputFileError, RequestError
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.foreign import (
    observer_state_of,
    report_bytes,
    report_of,
    statistics_of_observer,
    statistics_of_report,
    write_observer_state,
)
from reap_serve.statistics.record import Statistics
from reap_serve.statistics.saliency import mix_slices, saliency, slice_terms
from reap_serve.statistics.uncertainty import standard_error

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
MODEL = fingerprint(NUM_LAYERS, NUM_EXPERTS, TOP_K)


@pytest.fixture
def native() -> Statistics:
    tokens = random_tokens(np.random.default_rng(0), 200, NUM_LAYERS, NUM_EXPERTS, TOP_K, num_slices=2)
    return statistics_of(tokens, NUM_EXPERTS, ("chat", "code"), optional=True)


def kept_by_plan(statistics: Statistics, keep: int) -> list[list[bool]]:
    request = PlanRequest(Size(keep_experts=keep))
    evidence = gather(statistics, request, limits_of_statistics(statistics.header))
    kept: list[list[bool]] = decide(evidence, request.size).kept_LE.tolist()
    return kept


def test_report_names_blocks_and_the_experts_that_stay(native: Statistics) -> None:
    report = report_of(native, "reap", 3)
    assert list(report) == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]
    saliency_LE = saliency(mix_slices(native), "reap")
    for row, ids in enumerate(report.values()):
        assert ids == sorted(ids)
        assert saliency_LE[row, ids].min() > np.delete(saliency_LE[row], ids).max()
    with pytest.raises(RequestError, match="cannot keep 9 of 8"):
        report_of(native, "reap", 9)


@pytest.mark.parametrize("keep", [2, 4, 7])
def test_plans_from_a_report_and_from_the_native_file_agree(native: Statistics, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(report_bytes(report_of(native, "reap", keep)))
    imported = statistics_of_report(path, MODEL, range(NUM_LAYERS))
    assert kept_by_plan(imported, keep) == kept_by_plan(native, keep)
    assert imported.header.layers == native.header.layers
    assert not imported.header.complete
    # A choice has no errors, also not for the experts that it drops.
    assert np.isnan(standard_error(slice_terms(imported))).all()
    counts = imported.sums.token_count_SPLE.sum(axis=-1)
    assert np.array_equal(counts, TOP_K * imported.layer_token_count_SPL)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"model.layers.0.mlp": [0, 1], "model.layers.1.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [8], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": "all", "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [], "model.layers.1.mlp": [1], "model.layers.2.mlp": [0]}',
        '{"encoder": [0], "model.layers.1.mlp": [1], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [1], "model.layers.3.mlp": [0]}',
    ],
)
def test_what_is_no_report_of_the_model_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InputFileError) as caught:
        statistics_of_report(path, MODEL, range(NUM_LAYERS))
    assert "\n" not in str(caught.value)


def test_observer_state_has_the_reference_form(native: Statistics) -> None:
    state = observer_state_of(native)
    layer, sums = state[1], native.sums
    count_E = sums.token_count_SPLE[:, :, 1].sum(axis=(0, 1))
    assert layer["expert_frequency"].dtype == torch.int64
    assert layer["expert_frequency"].tolist() == count_E.tolist()
    assert int(layer["total_tokens"]) == 200
    assert layer["pairwise_expert_frequency"].diagonal().tolist() == count_E.tolist()
    np.testing.assert_allclose(layer["weighted_ean_sum"], sums.weighted_norm_sum_SPLE[:, :, 1].sum(axis=(0, 1)))
    np.testing.assert_allclose(layer["reap"], saliency(mix_slices(native), "reap")[1], rtol=1e-6)
    assert layer["reap"].dtype == torch.float32
    assert layer["ean_sum"].dtype == torch.float64


def test_observer_state_comes_back(native: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "observer.pt"
    path.write_bytes(write_observer_state(native))
    imported = statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    for criterion in ("reap", "frequency", "gate_sum", "ean_sum", "ean_mean", "weighted_ean_sum"):
        wanted, found = (saliency(mix_slices(item), criterion) for item in (native, imported))
        np.testing.assert_allclose(found, wanted, rtol=1e-12, err_msg=criterion)
    assert kept_by_plan(imported, 4) == kept_by_plan(native, 4)
    # It holds no second moments, so nothing is said of its errors.
    assert np.isnan(standard_error(slice_terms(imported))).all()
    again = statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    assert again.header.windows[0].id == imported.header.windows[0].id


def test_what_is_no_observer_state_of_the_model_is_refused(native: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "observer.pt"
    for state in ([1, 2], {0: {}}, {index: {"reap": torch.zeros(8)} for index in range(NUM_LAYERS)}):
        torch.save(state, path)
        with pytest.raises(InputFileError):
            statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    torch.save(observer_state_of(native), path)
    with pytest.raises(InputFileError, match="over 4 experts"):
        statistics_of_observer(path, fingerprint(NUM_LAYERS, 4, TOP_K), range(NUM_LAYERS))
    path.write_text(json.dumps({"not": "torch"}))
    with pytest.raises(InputFileError, match="no observer state"):
        statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    with pytest.raises(InputFileError, match="does not exist"):
        statistics_of_observer(tmp_path / "missing", MODEL, range(NUM_LAYERS))
