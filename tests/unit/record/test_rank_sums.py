"""Ranks of one engine joined to statistics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from reap_serve.errors import EngineError
from reap_serve.model import Fingerprint
from reap_serve.record.accumulate import LayerSums, RowMeasures
from reap_serve.record.snapshot import RankSums, join_ranks, layer_arrays
from reap_serve.records import provenance
from reap_serve.statistics.record import Layer, Window


def window(**changes: object) -> Window:
    values: dict[str, object] = {
        "id": "w",
        "started": "2030-01-01T00:00:00+00:00",
        "ended": "2030-01-01T00:01:00+00:00",
        "recorder": "deferred",
        "requests": 1,
        "prompt_tokens_total": 1,
        "prompt_tokens_computed": 1,
        "sample_fraction": 1.0,
        "complete": True,
    }
    return Window.model_validate(values | changes)


def rank(
    indices: tuple[int, ...], norm: float = 2.0, slices: tuple[str, ...] = ("a", "b"), **changes: object
) -> RankSums:
    """Layers in each of which one decoded token of slice b went to expert 1 with gate 0.5."""
    sums = LayerSums(num_slots=6, num_experts=2, device=torch.device("cpu"))
    measured = RowMeasures(*(torch.tensor([[value]]) for value in (0.5, 2.0, 1.0, 1.5)))
    sums.add(torch.tensor([3]), torch.tensor([[1]]), measured)
    layers = tuple(Layer(index=index, name=f"model.layers.{index}.mlp.experts") for index in indices)
    arrays = [layer_arrays(sums, num_slices=len(slices), num_phases=2) for _ in indices]
    return RankSums.stack(window(**changes), layers, slices, arrays)


def fingerprint(num_layers: int) -> Fingerprint:
    return Fingerprint(
        architecture="qwen3_moe",
        num_layers=num_layers,
        num_experts=2,
        top_k=1,
        dtype="float32",
        quantization=None,
        config_sha256="c" * 64,
        weights_sha256="d" * 64,
    )


def test_bytes_carry_everything() -> None:
    sent = rank((0, 1))
    received = RankSums.from_bytes(sent.to_bytes())
    for field in dataclasses.fields(RankSums):
        np.testing.assert_equal(getattr(received, field.name), getattr(sent, field.name))


def test_pipeline_ranks_bring_layers_of_their_own() -> None:
    joined = join_ranks([rank((2, 3)), rank((0, 1), complete=False)], fingerprint(4), {}, provenance())
    assert [layer.index for layer in joined.header.layers] == [0, 1, 2, 3]
    assert joined.layer_token_count_SPL[1].tolist() == [[0] * 4, [1] * 4]
    assert joined.sums.token_count_SPLE[1, 1].tolist() == [[0, 1]] * 4
    assert joined.sums.weighted_norm_sum_SPLE[1, 1].tolist() == [[0, 1.0]] * 4
    assert joined.sums.norm_max_SPLE[1, 1].tolist() == [[0, 2.0]] * 4
    assert joined.sums.activation_max_SPLE[1, 1].tolist() == [[0, 1.5]] * 4
    assert not joined.header.complete


def test_tensor_parallel_ranks_count_once() -> None:
    joined = join_ranks([rank((0,)), rank((0,))], fingerprint(1), {}, provenance())
    assert joined.sums.token_count_SPLE.sum() == 1
    assert joined.header.complete


def test_ranks_that_saw_different_tokens_are_refused() -> None:
    other = dataclasses.replace(rank((0,)), tokens_SPL=np.zeros((2, 2, 1), np.int64))
    with pytest.raises(EngineError, match="counted 1 and 0 tokens"):
        join_ranks([rank((0,)), other], fingerprint(1), {}, provenance())


def test_pipeline_ranks_with_different_slices_are_refused() -> None:
    with pytest.raises(EngineError, match="different slices"):
        join_ranks([rank((0,)), rank((1,), slices=("a", "c"))], fingerprint(2), {}, provenance())
