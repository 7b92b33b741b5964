"""The plan of a request: decision, predictions and provenance in one record."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from reap_serve.plan.decision import Decision, Evidence
from reap_serve.plan.record import SCHEMA_VERSION, Plan, PlanLayer
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.plan.summary import summarise
from reap_serve.records import JsonValue, provenance
from reap_serve.statistics.record import Header


def make_plan(
    header: Header,
    evidence: Evidence,
    decision: Decision,
    checkpoint: CheckpointBytes | None = None,
) -> Plan:
    """The record of a decision.

    Args:
        header: Of the statistics.
        evidence: What the decision rests on.
        decision: What stays.
        checkpoint: Sizes of the model's tensors, if they are known.
    """
    made = provenance(["numpy"]).model_dump()
    if evidence.unsound:
        stay = set(evidence.unsound_kept(decision))
        made["unsound_experts"] = [
            {"layer": layer, "expert": expert, "why": why, "kept": (layer, expert) in stay}
            for (layer, expert), why in evidence.unsound.items()
        ]
    request: dict[str, JsonValue] = {**asdict(evidence.request), "mix": dict(evidence.request.mix)}
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=header.model,
        criterion=evidence.request.criterion,
        provenance={
            **made,
            "windows": sorted(window.id for window in header.windows),
            "observed": _observed(header, evidence),
            "request": request,
        },
        summary=summarise(evidence, decision, checkpoint).model_dump(mode="json"),
        layers=tuple(
            PlanLayer(
                layer=layer.name,
                index=layer.index,
                kept=_ids(decision.kept_LE[position]),
                dropped=_ids(~decision.kept_LE[position]),
                saliency=tuple(evidence.saliency_LE[position].tolist()),
            )
            for position, layer in enumerate(header.layers)
        ),
    )


def _observed(header: Header, evidence: Evidence) -> dict[str, JsonValue]:
    """Requests of all windows, and tokens of each slice of the mixture; by age they weigh less, and are rounded."""
    tokens = {term.name: round(float(term.sums.layer_token_count_L.max())) for term in evidence.terms}
    return {"requests": sum(window.requests for window in header.windows), "tokens": tokens}


def format_plan(plan: Plan) -> bytes:
    """The bytes of a plan file: JSON with a line for each key and each layer, in the record's order."""
    document = plan.model_dump(mode="json")
    layers = document.pop("layers")
    lines = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in document.items()]
    rows = ",\n".join(f"  {json.dumps(layer, allow_nan=False)}" for layer in layers)
    lines.append(f' "layers": [\n{rows}\n ]')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _ids(mask_E: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask_E).tolist())
