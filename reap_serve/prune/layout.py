"""Where every byte of the output will stand: shard names, headers, offsets and index, before any byte moves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from reap_serve.prune.decide import Action, Decision
from reap_serve.records import JsonValue
from reap_serve.weight_headers import DTYPE_BITS, Shard

DEFAULT_SHARD_BYTES = 5 << 30
HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One file of the output.

    Attributes:
        name: Its name.
        source: Name of the source's file that all of its bytes come from.
        header: The header, with its length before it.
        decisions: Its tensors, in the order of their offsets.
        data_bytes: Bytes after the header.
    """

    name: str
    source: str
    header: bytes
    decisions: tuple[Decision, ...]
    data_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """All files with weights of the output.

    Attributes:
        shards: In the order of their names.
        num_parameters: Elements of all tensors; packed formats count storage elements.
    """

    shards: tuple[OutputShard, ...]
    num_parameters: int

    @property
    def num_tensors(self) -> int:
        """Tensors of all shards."""
        return sum(len(shard.decisions) for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors: `total_size` of the index."""
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files with weights."""
        return sum(shard.num_bytes for shard in self.shards)

    def index(self, metadata: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """The index file's content; counts that the source's index stated are stated anew."""
        stated: dict[str, JsonValue] = {**metadata, "total_size": self.data_bytes}
        if "total_parameters" in stated:
            stated["total_parameters"] = self.num_parameters
        weight_map = {decision.name: shard.name for shard in self.shards for decision in shard.decisions}
        return {"metadata": stated, "weight_map": dict(sorted(weight_map.items()))}


def lay_out(decisions: Sequence[Decision], shards: Mapping[str, Shard], shard_bytes: int) -> Layout:
    """Lays the output out: each source file becomes one file, or several of at most about `shard_bytes`.

    A file's tensors keep the source's order, so that kept neighbours are copied in one run; only where that would put
    a tensor off the alignment of its dtype, wider dtypes come first, as in files that safetensors writes.
    """
    parts: list[tuple[str, list[Decision]]] = []
    for source in shards:
        kept = [each for each in decisions if each.tensor.file == source and each.action is not Action.DROP]
        kept.sort(key=lambda each: each.tensor.offset)
        parts.extend((source, _aligned(part)) for part in _split(kept, shard_bytes))
    count = len(parts)
    width = max(5, len(str(count)))
    files = tuple(
        _output_shard(_shard_name(number, count, width), shards[source], part)
        for number, (source, part) in enumerate(parts, start=1)
    )
    return Layout(files, sum(math.prod(each.shape) for _, part in parts for each in part))


def _aligned(decisions: list[Decision]) -> list[Decision]:
    """The same tensors in an order in which each begins at a multiple of its dtype's size, as readers demand."""
    offset = 0
    for decision in decisions:
        if offset * 8 % DTYPE_BITS[decision.tensor.dtype]:
            return sorted(decisions, key=lambda each: -DTYPE_BITS[each.tensor.dtype])
        offset += decision.num_bytes
    return decisions


def _shard_name(number: int, count: int, width: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:0{width}d}-of-{count:0{width}d}.safetensors"


def _split(decisions: list[Decision], shard_bytes: int) -> Iterator[list[Decision]]:
    part: list[Decision] = []
    held = 0
    for decision in decisions:
        if part and held + decision.num_bytes > shard_bytes:
            yield part
            part, held = [], 0
        part.append(decision)
        held += decision.num_bytes
    if part:
        yield part


def _output_shard(name: str, source: Shard, decisions: list[Decision]) -> OutputShard:
    header = header_bytes(decisions, source.metadata)
    return OutputShard(name, source.name, header, tuple(decisions), sum(each.num_bytes for each in decisions))


def header_bytes(decisions: Sequence[Decision], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file that holds the decisions' tensors one after the other."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for decision in decisions:
        end = offset + decision.num_bytes
        entries[decision.name] = {
            "dtype": decision.tensor.dtype,
            "shape": list(decision.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def extents(decision: Decision) -> Iterator[tuple[int, int]]:
    """The runs of the source file (offset, bytes) that make up one output tensor, in its order.

    Neighbouring rows along the sliced axis are one run; an axis other than the first gives runs for each outer index.
    What `Decision.head` replaces is left out.
    """
    tensor = decision.tensor
    if decision.action is not Action.SLICE:
        skipped = len(decision.head)
        yield tensor.offset + skipped, tensor.num_bytes - skipped
        return
    num_outer = math.prod(tensor.shape[: decision.axis])
    if not tensor.num_bytes:
        return
    outer_bytes = tensor.num_bytes // num_outer
    row_bytes = outer_bytes // tensor.shape[decision.axis]
    runs = list(_runs(decision.rows))
    for outer in range(num_outer):
        start = tensor.offset + outer * outer_bytes
        for first, count in runs:
            yield start + first * row_bytes, count * row_bytes


def coalesced(pieces: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Joins pieces that follow each other in the source without a gap; empty pieces vanish."""
    start, length = 0, 0
    for offset, size in pieces:
        if not size:
            continue
        if length and offset == start + length:
            length += size
            continue
        if length:
            yield start, length
        start, length = offset, size
    if length:
        yield start, length


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    return coalesced((row, 1) for row in rows)
