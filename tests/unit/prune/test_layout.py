"""Layout: extents against plain slicing, coalescing, alignment."""

from __future__ import annotations

import itertools
import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from reap_serve.prune.decide import Action, Decision
from reap_serve.prune.layout import coalesced, extents, lay_out
from reap_serve.weight_headers import FileState, Shard, Tensor

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(data=st.data(), shape=shapes, start=st.integers(0, 9))
@settings(deadline=None)
def test_extents_are_what_numpy_would_take(data: st.DataObject, shape: list[int], start: int) -> None:
    """Bytes taken along any axis are those of `numpy.take`, in its order."""
    import numpy as np

    axis = data.draw(st.integers(0, len(shape) - 1))
    rows = data.draw(st.lists(st.sampled_from(range(shape[axis])), min_size=1, unique=True).map(sorted))
    size = math.prod(shape)
    content = bytes(start) + bytes(value % 251 for value in range(size * 2))
    array = np.frombuffer(content[start:], dtype=np.uint16).reshape(shape)
    tensor = Tensor("t", "f", "U16", tuple(shape), start, size * 2)
    decision = Decision(tensor, Action.SLICE, "t", axis, tuple(rows))
    taken = b"".join(content[offset : offset + length] for offset, length in extents(decision))
    assert taken == np.take(array, rows, axis).tobytes()
    assert len(taken) == decision.num_bytes
    assert decision.shape == np.take(array, rows, axis).shape


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5))))
def test_coalescing_changes_no_byte_and_leaves_no_neighbours(pieces: list[tuple[int, int]]) -> None:
    joined = list(coalesced(iter(pieces)))

    def taken(runs: list[tuple[int, int]]) -> list[int]:
        return [byte for offset, length in runs for byte in range(offset, offset + length)]

    assert taken(joined) == taken(pieces)
    assert all(length for _, length in joined)
    assert all(first[0] + first[1] != second[0] for first, second in itertools.pairwise(joined))


def test_kept_neighbours_and_rows_are_copied_in_one_run() -> None:
    tensor = Tensor("t", "f", "U8", (8, 10), 100, 80)
    decision = Decision(tensor, Action.SLICE, "t", 0, (1, 2, 3, 6, 7))
    assert list(extents(decision)) == [(110, 30), (160, 20)]


def test_an_order_off_the_alignment_is_mended_and_any_other_kept() -> None:
    """Three bytes before a F32 put it at offset 3; readers cannot view it there."""
    byte = Tensor("byte", "f", "U8", (3,), 50, 3)
    word = Tensor("word", "f", "F32", (2,), 53, 8)
    half = Tensor("half", "f", "F16", (2,), 61, 4)
    shards = {"f": Shard("f", FileState(65, 0, 0), {}, (byte, word, half))}

    def order(*tensors: Tensor) -> list[str]:
        layout = lay_out([Decision(each, Action.KEEP, each.name) for each in tensors], shards, 1 << 30)
        header = layout.shards[0].header
        assert len(header) % 8 == 0
        return list(json.loads(header[8:]))

    assert order(byte, word, half) == ["word", "half", "byte"]
    assert order(word, half) == ["word", "half"]


def test_files_without_a_kept_tensor_vanish_and_numbers_follow() -> None:
    tensors = [Tensor(name, name, "U8", (4,), 50, 4) for name in ("a", "b", "c")]
    shards = {each.name: Shard(each.name, FileState(54, 0, 0), {}, (each,)) for each in tensors}
    decisions = [
        Decision(tensors[0], Action.KEEP, "a"),
        Decision(tensors[1], Action.DROP, "b"),
        Decision(tensors[2], Action.RENAME, "d"),
    ]
    layout = lay_out(decisions, shards, 1 << 30)
    assert [shard.name for shard in layout.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert layout.index({})["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "d": "model-00002-of-00002.safetensors",
    }
    assert layout.data_bytes == 8
