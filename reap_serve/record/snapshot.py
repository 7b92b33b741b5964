"""One rank's sums on their way out of the engine process, and the ranks of one engine joined to statistics.

Axes: S slices, P phases, L layers, E experts, C columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from reap_serve.errors import EngineError
from reap_serve.model import Fingerprint
from reap_serve.record.accumulate import MAX_COLUMNS, SUM_COLUMNS, LayerSums
from reap_serve.record.extra_sums import ExtraSums
from reap_serve.records import Provenance
from reap_serve.statistics.record import (
    EXPERT_SUMS,
    LAYER_FIELD,
    SCHEMA_VERSION,
    Floats,
    Header,
    Ints,
    Layer,
    Statistics,
    Window,
)

OPTIONAL = {each.name: each.field for each in EXPERT_SUMS if each.is_asked_for}


@dataclass(frozen=True, slots=True)
class LayerArrays:
    """One layer: sums [S, P, E, C], maxima [S, P, E, C], tokens [S, P], optional sums [S, P, E, ...] by name."""

    sums: npt.NDArray[np.float64]
    maxima: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]
    extra: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def layer_arrays(sums: LayerSums, num_slices: int, num_phases: int, extra: ExtraSums | None = None) -> LayerArrays:
    """Copies the used slots of a layer's sums to the main memory; the trash stays."""
    used, axes = num_slices * num_phases, (num_slices, num_phases, sums.num_experts)
    return LayerArrays(
        sums.sums_SEC[:used].cpu().numpy().reshape(*axes, len(SUM_COLUMNS)).copy(),
        sums.maxima_SEC[:used].cpu().numpy().reshape(*axes, len(MAX_COLUMNS)).copy(),
        sums.tokens_S[:used].cpu().numpy().reshape(num_slices, num_phases).copy(),
        {}
        if extra is None
        else {
            name: values.reshape(num_slices, num_phases, *values.shape[1:])
            for name, values in extra.arrays(used).items()
        },
    )


@dataclass(frozen=True, slots=True)
class RankSums:
    """The window of one rank; `extra` has the optional sums by name, axes [S, P, L, E, ...]."""

    window: Window
    layers: tuple[Layer, ...]
    slices: tuple[str, ...]
    sums_SPLEC: npt.NDArray[np.float64]
    maxima_SPLEC: npt.NDArray[np.float32]
    tokens_SPL: npt.NDArray[np.int64]
    extra: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def stack(
        cls, window: Window, layers: tuple[Layer, ...], slices: tuple[str, ...], arrays: Sequence[LayerArrays]
    ) -> RankSums:
        """The layers' arrays side by side."""
        return cls(
            window,
            layers,
            slices,
            np.stack([layer.sums for layer in arrays], axis=2),
            np.stack([layer.maxima for layer in arrays], axis=2),
            np.stack([layer.tokens for layer in arrays], axis=2),
            {name: np.stack([layer.extra[name] for layer in arrays], axis=2) for name in arrays[0].extra},
        )

    def to_bytes(self) -> bytes:
        """As bytes, for vLLM's RPC; no pickle."""
        meta = {
            "window": self.window.model_dump_json(),
            "layers": json.dumps([layer.model_dump() for layer in self.layers]),
            "slices": json.dumps(self.slices),
        }
        arrays: Mapping[str, npt.NDArray[np.generic]] = {
            "sums": self.sums_SPLEC,
            "maxima": self.maxima_SPLEC,
            "tokens": self.tokens_SPL,
            "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
            **self.extra,
        }
        return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> RankSums:
        """The inverse of `to_bytes`."""
        arrays = load(content)
        meta = json.loads(arrays["meta"].tobytes())
        return cls(
            Window.model_validate_json(meta["window"]),
            tuple(Layer.model_validate(layer) for layer in json.loads(meta["layers"])),
            tuple(json.loads(meta["slices"])),
            arrays["sums"],
            arrays["maxima"],
            arrays["tokens"],
            {name: arrays[name] for name in OPTIONAL if name in arrays},
        )


def join_ranks(
    ranks: Sequence[RankSums], model: Fingerprint, engine: dict[str, str], provenance: Provenance
) -> Statistics:
    """The statistics of one engine from its ranks.

    Pipeline ranks bring layers of their own. Ranks that bring the same layers are tensor-parallel: each has measured
    complete rows of the same tokens, so the first one speaks for all.

    Raises:
        EngineError: The ranks saw different tokens.
    """
    stages: dict[int, RankSums] = {}
    for rank in ranks:
        first = stages.setdefault(rank.layers[0].index, rank)
        if not np.array_equal(first.tokens_SPL, rank.tokens_SPL):
            raise EngineError(
                f"tensor-parallel ranks counted {first.tokens_SPL.sum()} and {rank.tokens_SPL.sum()} tokens",
                "observe again; if it happens again, report it",
            )
    parts = [stages[index] for index in sorted(stages)]
    if any(part.slices != parts[0].slices for part in parts):
        raise EngineError("pipeline ranks saw different slices", "observe again; if it happens again, report it")
    sums = np.concatenate([part.sums_SPLEC for part in parts], axis=2)
    maxima = np.concatenate([part.maxima_SPLEC for part in parts], axis=2).astype(np.float64)
    recorders = dict.fromkeys(part.window.recorder for part in parts)
    window = parts[0].window.model_copy(
        update={"complete": all(rank.window.complete for rank in ranks), "recorder": ", ".join(recorders)}
    )
    header = Header(
        schema_version=SCHEMA_VERSION,
        model=model,
        layers=tuple(layer for part in parts for layer in part.layers),
        slices=parts[0].slices,
        windows=(window,),
        engine=engine,
        provenance=provenance,
    )
    by_name = {name: np.ascontiguousarray(sums[..., column]) for column, name in enumerate(SUM_COLUMNS)}
    by_name |= {name: np.ascontiguousarray(maxima[..., column]) for column, name in enumerate(MAX_COLUMNS)}
    by_name |= {name: np.concatenate([part.extra[name] for part in parts], axis=2) for name in parts[0].extra}
    fields: dict[str, Ints | Floats] = {
        each.field: by_name[each.name].astype(np.int64) if each.is_count else by_name[each.name]
        for each in EXPERT_SUMS
        if each.name in by_name
    }
    fields[LAYER_FIELD] = np.concatenate([part.tokens_SPL for part in parts], axis=2)
    return Statistics.from_fields(header, fields)
