"""Adds statistics: associative and commutative, one model only, no window twice.

Sums are added and maxima taken, so counts and maxima are exact in any order and grouping; float64 sums agree to
rounding (relative 1e-16 times the number of inputs). Slices are joined by name, layers by index: the ranks of a
pipeline fit together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import numpy as np
import numpy.typing as npt

from reap_serve.errors import MismatchError, RequestError
from reap_serve.statistics.ageing import age_weights, exponent_of
from reap_serve.statistics.file import blocks_in_memory, read_blocks
from reap_serve.statistics.headers import merge_headers
from reap_serve.statistics.layout import Block, Layout, read_layout, require_unchanged
from reap_serve.statistics.record import (
    BATCH_FIELDS,
    OPTIONAL_FIELDS,
    PHASES,
    SUMS,
    Ageing,
    BatchSums,
    Floats,
    Header,
    Ints,
    Layer,
    Statistics,
    zeros,
)
from reap_serve.statistics.storage import expand_directories, open_source, read_ahead


def merge(statistics: Sequence[Statistics], half_life: timedelta | None = None) -> Statistics:
    """The sum of statistics.

    Optional sums survive only where every input has them. The result does not depend on the order of the inputs.

    Args:
        statistics: The inputs.
        half_life: Weighs each by its age, see `ageing`; None adds them as they are.

    Raises:
        MismatchError: The models differ, a layer has two names, a window is there twice, or ages do not fit.
        RequestError: There is nothing to merge.
    """
    # Addition in one fixed order makes the float64 sums the same to the bit, whatever the order of the arguments.
    ordered = sorted(statistics, key=lambda item: item.header.windows[0].id)
    shapes = [{name: values.shape[2:] for name, values in item.fields_by_name().items()} for item in ordered]
    names = [f"statistics of window {item.header.windows[0].id}" for item in ordered]
    headers = [item.header for item in ordered]
    weights = age_weights(headers, names, half_life)
    accumulator = _Accumulator(headers, shapes, names, weights.ageing)
    for item, weight in zip(ordered, weights.of_inputs, strict=True):
        accumulator.weight = weight
        accumulator.add_statistics(item)
    return accumulator.result()


def join_batches(parts: Sequence[Statistics]) -> Statistics:
    """The sum of consecutive parts of one window, each a batch of its own; the result holds their moments.

    A recorder that starts again after every few requests and joins the parts learns how much the traffic varies (see
    `BatchSums`). A joined part may be joined with the next.

    Args:
        parts: Of one model and process, in order, each with the requests of its own stretch only; ids of windows are
            not compared.

    Returns:
        The sum, with one window over all: the first one's id, the requests and prompt tokens added up, the fraction of
        the real tokens that were recorded.
    """
    windows = [window for part in parts for window in part.header.windows]
    relabelled = []
    for index, part in enumerate(parts):
        label = (windows[0].model_copy(update={"id": str(index)}),)
        relabelled.append(replace(part, header=part.header.model_copy(update={"windows": label})))
    joined = merge(relabelled)
    sampled = [int(part.layer_token_count_SPL.sum()) for part in parts]
    real = sum(tokens / part.header.windows[0].sample_fraction for tokens, part in zip(sampled, parts, strict=True))
    window = windows[0].model_copy(
        update={
            "ended": windows[-1].ended,
            "requests": sum(window.requests for window in windows),
            "prompt_tokens_total": sum(window.prompt_tokens_total for window in windows),
            "prompt_tokens_computed": sum(window.prompt_tokens_computed for window in windows),
            "sample_fraction": min(sum(sampled) / real, 1.0) if real else windows[0].sample_fraction,
            "complete": all(window.complete for window in windows),
        }
    )
    return replace(joined, header=joined.header.model_copy(update={"windows": (window,)}))


def merge_files(paths: Iterable[str], half_life: timedelta | None = None) -> Statistics:
    """The sum of statistics files, holding one accumulator and a few files at a time.

    Args:
        paths: Local paths and fsspec URLs; a directory stands for the files in it.
        half_life: Weighs each by its age, see `ageing`; None adds them as they are.

    Raises:
        InputFileError: A file is missing or unsound.
        MismatchError: See `merge`.
        RequestError: There is nothing to merge.
        StorageError: A file changed while it was read.
    """
    layouts: list[tuple[str, Layout]] = []
    for path in expand_directories(paths):
        with open_source(path) as (handle, size):
            layouts.append((path, read_layout(handle, size, path)))
    layouts.sort(key=lambda item: item[1].header.windows[0].id)

    headers, names = [layout.header for _, layout in layouts], [path for path, _ in layouts]
    weights = age_weights(headers, names, half_life)
    accumulator = _Accumulator(headers, [layout.shapes for _, layout in layouts], names, weights.ageing)
    contents = read_ahead(names)
    for (path, content), (_, layout), weight in zip(contents, layouts, weights.of_inputs, strict=True):
        accumulator.weight = weight
        if content is not None:
            _add_file(accumulator, layout, blocks_in_memory(content, layout, path))
            continue
        with open_source(path) as (handle, _):
            require_unchanged(handle.read(layout.header_bytes), layout, path)
            _add_file(accumulator, layout, read_blocks(handle, layout, path))
    return accumulator.result()


def _add_file(
    accumulator: _Accumulator, layout: Layout, blocks: Iterable[tuple[Block, npt.NDArray[np.generic]]]
) -> None:
    slices, layers = layout.header.slices, layout.header.layers
    batch = _OneBatch(len(slices)) if not layout.has_batches else None
    for block, values in blocks:
        accumulator.add(block.field, slices[block.slice_index], block.phase_index, layers, values)
        if batch is not None:
            batch.add(block, values)
    if batch is not None:
        for s, slice_name in enumerate(slices):
            moments = BatchSums.of_one(batch.token_count_S[s], batch.weighted_norm_sum_S[s])
            accumulator.add_batches(moments, slice_name, layers)


class _OneBatch:
    """A file's counts and sums of g|f| per slice, phases added up: small enough to stay in the cache."""

    def __init__(self, num_slices: int) -> None:
        self.token_count_S: list[Floats] = [np.zeros(())] * num_slices
        self.weighted_norm_sum_S: list[Floats] = [np.zeros(())] * num_slices

    def add(self, block: Block, values_LE: npt.NDArray[np.generic]) -> None:
        """Takes what belongs to the moments."""
        sums_S = {"token_count_SPLE": self.token_count_S, "weighted_norm_sum_SPLE": self.weighted_norm_sum_S}
        if block.field in sums_S:
            held = sums_S[block.field]
            held[block.slice_index] = np.add(held[block.slice_index], values_LE, dtype=np.float64)


def select_slices(statistics: Statistics, names: Sequence[str]) -> Statistics:
    """The statistics of some slices, in the order given.

    Raises:
        RequestError: There is no such slice.
    """
    positions = [_position(name, statistics.header.slices) for name in names]
    traffic = {name: receipt for name, receipt in statistics.header.traffic.items() if name in names}
    header = statistics.header.model_copy(update={"slices": tuple(names), "traffic": traffic})
    selected = {name: values[positions] for name, values in statistics.fields_by_name().items()}
    if statistics.batches is not None:
        selected |= {name: getattr(statistics.batches, name)[positions] for name in BATCH_FIELDS}
    return Statistics.from_fields(header, selected)


def _position(name: str, slices: tuple[str, ...]) -> int:
    if name not in slices:
        raise RequestError(f"there is no slice {name}", f"use one of: {', '.join(slices)}")
    return slices.index(name)


class _Accumulator:
    """Sums that grow by one tensor at a time."""

    def __init__(
        self,
        headers: Sequence[Header],
        shapes: Sequence[Mapping[str, tuple[int, ...]]],
        names: Sequence[str],
        ageing: Ageing | None = None,
    ) -> None:
        """Allocates the sums.

        Args:
            headers: Of every input.
            shapes: Per input, the shape without the axes S and P of each of its fields.
            names: Of the inputs, for errors.
            ageing: Of the result.
        """
        # Of the input that is added now.
        self.weight = 1.0
        aged = ageing is not None
        self._header = merge_headers(headers, names).model_copy(update={"ageing": ageing})
        self._row_of_layer = {layer.index: row for row, layer in enumerate(self._header.layers)}
        self._slice_index = {name: index for index, name in enumerate(self._header.slices)}
        dropped = {name for name in OPTIONAL_FIELDS if any(name not in shape for shape in shapes)}
        num_layers = len(self._header.layers)
        self._arrays: dict[str, Ints | Floats] = {}
        for field, first in shapes[0].items():
            if field in dropped:
                continue
            for shape, name in zip(shapes, names, strict=True):
                if shape[field][1:] != first[1:]:
                    raise MismatchError(
                        f"{names[0]} and {name} disagree on the shape of {field}: {first[1:]} against "
                        f"{shape[field][1:]}",
                        "use files that were made from the same checkpoint",
                    )
            self._arrays[field] = zeros(
                field, (len(self._header.slices), len(PHASES), num_layers, *first[1:]), aged=aged
            )
        for field in BATCH_FIELDS:
            self._arrays[field] = zeros(
                field, (len(self._header.slices), num_layers, self._header.model.num_experts), aged=aged
            )

    def add(
        self,
        field: str,
        slice_name: str,
        phase_index: int | None,
        layers: Sequence[Layer],
        values: npt.NDArray[np.generic],
    ) -> None:
        """Adds one tensor, axes [L, ...] with L as in `layers`; fields of `BatchSums` have no phase."""
        if field not in self._arrays:
            return
        target = self._arrays[field][self._slice_index[slice_name]]
        if phase_index is not None:
            target = target[phase_index]
        combine = SUMS[field].merge.combine
        if self.weight != 1.0:
            values = np.multiply(values, self.weight ** exponent_of(field), dtype=np.float64)
        if len(layers) == len(target):
            combine(target, values, out=target)
        else:
            rows = [self._row_of_layer[layer.index] for layer in layers]
            target[rows] = combine(target[rows], values)

    def add_batches(self, moments: BatchSums, slice_name: str, layers: Sequence[Layer]) -> None:
        """Adds the moments of one slice's batches, axes [L, E]."""
        for field in BATCH_FIELDS:
            self.add(field, slice_name, None, layers, getattr(moments, field))

    def add_statistics(self, statistics: Statistics) -> None:
        """Adds all of some statistics."""
        for field, values in statistics.fields_by_name().items():
            for s, slice_name in enumerate(statistics.header.slices):
                for p in range(len(PHASES)):
                    self.add(field, slice_name, p, statistics.header.layers, values[s, p])
        moments = statistics.batch_sums()
        for field in BATCH_FIELDS:
            for s, slice_name in enumerate(statistics.header.slices):
                self.add(field, slice_name, None, statistics.header.layers, getattr(moments, field)[s])

    def result(self) -> Statistics:
        """The sums so far."""
        return Statistics.from_fields(self._header, self._arrays)
