"""Exchange with llm-compressor and the reference implementation."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from token_rows import fingerprint, random_tokens, statistics_of

from reap_serve.errors import InputFileError, RequestError
from reap_serve.plan.decision import decide, gather
from reap_serve.plan.model_limits import limits_of_statistics
from reap_serve.plan.request import PlanRequest, Size
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.foreign import report_bytes, report_of, statistics_of_report
from reap_serve.statistics.observer_state import observer_state_of, statistics_of_observer, write_observer_state
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
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [-1], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [true], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [1.0], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [1, 1], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [NaN], "model.layers.2.mlp": [0]}',
        '{"model.layers.0.mlp": [0], "model.layers.1.mlp": [1], "model.layers.%s.mlp": [0]}' % ("9" * 5000),
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
    assert layer["pairwise_expert_frequency"].tolist() == [[a + b for b in count_E] for a in count_E]
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
    with pytest.raises(InputFileError, match=r"shape \[8\] where the model needs \[4\]"):
        statistics_of_observer(path, fingerprint(NUM_LAYERS, 4, TOP_K), range(NUM_LAYERS))
    path.write_text(json.dumps({"not": "torch"}))
    with pytest.raises(InputFileError, match="no observer state"):
        statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    with pytest.raises(InputFileError, match="does not exist"):
        statistics_of_observer(tmp_path / "missing", MODEL, range(NUM_LAYERS))


COUNTS = torch.tensor([3, 0, 4, 1, 2, 5, 0, 1])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_frequency", None, "expert_frequency is missing"),
        ("expert_frequency", [1, 2], "expert_frequency is no tensor"),
        ("expert_frequency", torch.tensor(1), r"shape \[\] where"),
        ("expert_frequency", torch.ones(1), r"shape \[1\] where"),
        ("expert_frequency", torch.ones(1, 8), r"shape \[1, 8\] where"),
        ("expert_frequency", COUNTS + 0.5, "what is no count"),
        ("expert_frequency", -COUNTS, "negative"),
        ("expert_frequency", COUNTS > 0, "truth values"),
        ("expert_frequency", COUNTS * 10, "an expert has 50 of 10 tokens"),
        ("total_tokens", torch.tensor(-1), "negative"),
        ("total_tokens", torch.tensor(float("inf")), "not finite"),
        ("total_tokens", torch.tensor(2.5), "what is no count"),
        ("total_tokens", torch.ones(8), r"shape \[8\] where"),
        ("total_tokens", 2**70, "what is no count"),
        ("total_tokens", True, "total_tokens is no tensor"),
        ("total_tokens", "10", "total_tokens is no tensor"),
        ("ean_sum", torch.full((8,), float("nan")), "not finite"),
        ("ean_sum", torch.full((8,), float("inf")), "not finite"),
        ("ean_sum", torch.full((8,), 1e300, dtype=torch.float64), "beyond float32"),
        ("ean_sum", -torch.ones(8), "negative"),
        ("ean_sum", torch.ones(8), "a sum of an expert without a token"),
        ("weighted_ean_sum", torch.ones(8, dtype=torch.complex64), "not a plain tensor"),
        ("weighted_ean_sum", torch.ones(8).to_sparse(), "not a plain tensor"),
        ("max_activations", torch.ones(8, device="meta"), "not a plain tensor"),
        ("weighted_expert_frequency_sum", torch.ones(2**20).expand(8, 2**20), "shape"),
    ],
)
def test_a_sum_that_is_none_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    sums = COUNTS.to(torch.bfloat16)
    state: dict[int, dict[str, object]] = {
        index: {
            "expert_frequency": COUNTS,
            "total_tokens": 10,
            "weighted_expert_frequency_sum": sums,
            "ean_sum": torch.nn.Parameter(sums.float()),
            "weighted_ean_sum": sums.to(torch.float16),
            "max_activations": sums,
        }
        for index in range(NUM_LAYERS)
    }
    path = tmp_path / "observer.pt"
    torch.save(state, path)
    sound = statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    write_statistics(sound, str(tmp_path / "sound.safetensors"), overwrite=False)
    assert read_statistics(str(tmp_path / "sound.safetensors")).layer_token_count_SPL.max() == 10
    if value is None:
        del state[1][key]
    else:
        state[1][key] = value
    torch.save(state, path)
    with pytest.raises(InputFileError, match=message) as caught:
        statistics_of_observer(path, MODEL, range(NUM_LAYERS))
    assert "layer 1" in str(caught.value)


def test_a_file_that_unpacks_into_more_than_itself_is_refused(native: Statistics, tmp_path: Path) -> None:
    path, packed = tmp_path / "observer.pt", tmp_path / "packed.pt"
    path.write_bytes(write_observer_state(native))
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(InputFileError, match="no observer state"):
        statistics_of_observer(packed, MODEL, range(NUM_LAYERS))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({0: {"ean_sum": Runs()}}, tmp_path / "observer.pt")
    with pytest.raises(InputFileError, match="without running code"):
        statistics_of_observer(tmp_path / "observer.pt", MODEL, range(1))
    assert not (tmp_path / "ran").exists()
