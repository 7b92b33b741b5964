"""Statistics to and from llm-compressor's report, and what every imported file has in common.

llm-compressor (`REAPPruningModifier.report_path`): JSON, name of the MoE block to the ids of the experts that stay.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from reap_serve.errors import InputFileError, RequestError
from reap_serve.model import Fingerprint
from reap_serve.records import provenance, read_json_object
from reap_serve.statistics.record import (
    SCHEMA_VERSION,
    ExpertSums,
    Header,
    Layer,
    Statistics,
    Window,
)
from reap_serve.statistics.saliency import keep_largest, mix_slices, saliency

SLICE = "imported"
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.([0-9]{1,6})(?:\.|$)")


def report_of(statistics: Statistics, criterion: str, keep: int) -> dict[str, list[int]]:
    """llm-compressor's report: the experts of the highest saliency per layer, ascending by id.

    Raises:
        RequestError: There is no such criterion, or `keep` is not 1 to E.
    """
    saliency_LE = saliency(mix_slices(statistics), criterion)
    if not 1 <= keep <= saliency_LE.shape[1]:
        raise RequestError(f"cannot keep {keep} of {saliency_LE.shape[1]} experts", "give another --keep-experts")
    return {
        layer.name.removesuffix(".experts"): np.flatnonzero(kept_E).tolist()
        for layer, kept_E in zip(statistics.header.layers, keep_largest(saliency_LE, keep), strict=True)
    }


def statistics_of_report(path: Path, model: Fingerprint, moe_layers: Sequence[int]) -> Statistics:
    """Statistics that rank the experts a report retains above all others.

    A report holds a choice and no sums: retained experts get saliency 1, the others 0, and the window is marked
    incomplete. Planning with the report's own number of experts gives the report's choice.

    Args:
        path: The report.
        model: Fingerprint of the model that it was made of.
        moe_layers: Indices of its layers with routed experts, ascending.

    Raises:
        InputFileError: It is no report, or names other layers or experts than the model has.
    """
    names: dict[int, str] = {}
    retained: dict[int, list[int]] = {}
    for name, ids in read_json_object(path).items():
        found = _LAYER_INDEX.search(name)
        sound = (
            isinstance(ids, list)
            and 0 < len(ids) == len({repr(id_) for id_ in ids})
            and all(type(id_) is int and 0 <= id_ < model.num_experts for id_ in ids)
        )
        if found is None or not sound or int(found[1]) in retained:
            raise InputFileError(
                f"{path}: {name[:120]!r} is not a layer with a list of different expert ids below {model.num_experts}",
                "give the report that llm-compressor wrote for this model",
            )
        names[int(found[1])] = f"{name.removesuffix('.experts')}.experts"
        retained[int(found[1])] = [int(id_) for id_ in ids]  # type: ignore[arg-type, union-attr]
    require_layers(path, retained, moe_layers)
    sums = ExpertSums.zeros(1, len(moe_layers), model.num_experts)
    # top_k tokens an expert make E tokens a layer, so that the counts add up.
    sums.token_count_SPLE[0, 0] = model.top_k
    for row, index in enumerate(moe_layers):
        sums.weighted_norm_sum_SPLE[0, 0, row, retained[index]] = model.top_k
    layer_token_count_SPL = np.zeros((1, 2, len(moe_layers)), np.int64)
    layer_token_count_SPL[0, 0] = model.num_experts
    layers = [Layer(index=index, name=names[index]) for index in moe_layers]
    header = imported_header(path, model, layers, "llm-compressor report", complete=False)
    return Statistics(header, sums, layer_token_count_SPL)


def report_bytes(report: Mapping[str, Sequence[int]]) -> bytes:
    """The bytes of llm-compressor's file."""
    return (json.dumps(report, indent=2) + "\n").encode()


def require_layers(path: Path, found: Mapping[int, object], moe_layers: Sequence[int]) -> None:
    """Refuses a file whose layers are not those of the model.

    Raises:
        InputFileError: They differ.
    """
    if set(found) != set(moe_layers):
        raise InputFileError(
            f"{path} has {len(found)} layers, the model {len(moe_layers)} with routed experts; they are not the same",
            "give the file of this model",
        )


def imported_header(
    path: Path, model: Fingerprint, layers: Sequence[Layer], recorder: str, *, complete: bool
) -> Header:
    """The header of statistics that another tool's file was read into."""
    made = provenance()
    window = Window(
        # The same file imported twice is the same window, so merging both is refused.
        id=hashlib.sha256(path.read_bytes()).hexdigest()[:32],
        started=made.created,
        ended=made.created,
        recorder=recorder,
        requests=0,
        prompt_tokens_total=0,
        prompt_tokens_computed=0,
        sample_fraction=1.0,
        complete=complete,
    )
    return Header(
        schema_version=SCHEMA_VERSION,
        model=model,
        layers=tuple(layers),
        slices=(SLICE,),
        windows=(window,),
        engine={"imported": recorder},
        provenance=made,
    )
