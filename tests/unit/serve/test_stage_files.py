"""The stages of a pipeline write files of their own, each of its layers: read together they are those of one engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from reap_serve.model import Fingerprint
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.records import provenance
from reap_serve.statistics.merge import merge_files
from reap_serve.statistics.rotation import StatisticsWriter

NUM_LAYERS, NUM_EXPERTS, HIDDEN = 4, 3, 8
MODEL = Fingerprint(
    architecture="qwen3_moe",
    num_layers=NUM_LAYERS,
    num_experts=NUM_EXPERTS,
    top_k=2,
    dtype="float32",
    quantization=None,
    config_sha256="c" * 64,
    weights_sha256="w" * 64,
)


def layer_facts(index: int) -> LayerFacts:
    """A layer whose expert e multiplies by (e + 1) * (index + 1)."""
    return LayerFacts(
        name=f"model.layers.{index}.mlp.experts",
        index=index,
        num_experts=NUM_EXPERTS,
        top_k=2,
        gate_scale=1.0,
        weight_on_input=False,
        forward_experts=lambda x, weights, ids: x * (ids + 1) * (index + 1) * weights,
    )


def serve(indices: Sequence[int]) -> RankSums:
    """Three steps through these layers: a prefill of two requests, and two steps of answers."""
    requests = Requests(max_slices=4)
    recorder = StepRecorder(
        ObserveSettings(buffer_tokens=4),
        [layer_facts(index) for index in indices],
        torch.device("cpu"),
        1,
        requests,
        64,
    )
    for number, name in enumerate(("code", "prose")):
        requests.enter(NewRequest(f"r{number}", 4 + number, {"reap_slice": name}), None)
    random = np.random.default_rng(7)
    for scheduled, computed in (([4, 5], [0, 0]), ([1, 1], [4, 5]), ([1, 1], [5, 6])):
        recorder.begin(requests.step(BatchRows(["r0", "r1"], scheduled, computed)))
        for index in range(NUM_LAYERS):
            x_TH = torch.from_numpy(random.normal(size=(sum(scheduled), HIDDEN))).float()
            gate_TK = torch.from_numpy(random.random((sum(scheduled), 2))).float()
            ids_TK = torch.from_numpy(np.argsort(random.random((sum(scheduled), NUM_EXPERTS)))[:, :2].copy()).int()
            if index in indices:
                recorder.taps[indices.index(index)].record(x_TH, gate_TK, ids_TK)
        recorder.end()
    return recorder.snapshot()


def test_files_of_stages_join(tmp_path: Path) -> None:
    whole = join_ranks([serve(range(NUM_LAYERS))], MODEL, {}, provenance())
    for stage in ((0, 1), (2, 3)):
        writer = StatisticsWriter(str(tmp_path), 3600.0, 0)
        part = join_ranks([serve(stage)], MODEL, {}, provenance())
        assert not part.header.complete
        writer.offer(part)
        writer.close()
    joined = merge_files([str(path) for path in sorted(tmp_path.glob("*.safetensors"))])
    assert joined.header.complete
    assert joined.header.layers == whole.header.layers
    for name, values in whole.fields_by_name().items():
        np.testing.assert_array_equal(joined.fields_by_name()[name], values, err_msg=name)
    assert int(joined.layer_token_count_SPL.sum()) == 13 * NUM_LAYERS


def test_ranks_of_stages_join_without_files() -> None:
    whole = serve(range(NUM_LAYERS))
    joined = join_ranks([serve((2, 3)), serve((0, 1))], MODEL, {}, provenance())
    assert joined.header.complete
    expected = join_ranks([dataclasses.replace(whole)], MODEL, {}, provenance())
    for name, values in expected.fields_by_name().items():
        np.testing.assert_array_equal(joined.fields_by_name()[name], values, err_msg=name)
