"""Statistics to and from the forms of other tools: llm-compressor's report and the reference implementation's observer.

llm-compressor (`REAPPruningModifier.report_path`): JSON, name of the MoE block to the ids of the experts that stay.
CerebrasResearch/reap (`observer.save_state`): a `torch.save` file, index of the decoder layer to tensors over experts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from reap_serve.statistics.saliency import mix_slices, saliency

if TYPE_CHECKING:
    import torch

SLICE = "imported"
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")


def report_of(statistics: Statistics, criterion: str, keep: int) -> dict[str, list[int]]:
    """llm-compressor's report: the experts of the highest saliency per layer, ascending by id.

    Raises:
        RequestError: There is no such criterion, or `keep` is not 1 to E.
    """
    saliency_LE = saliency(mix_slices(statistics), criterion)
    if not 1 <= keep <= saliency_LE.shape[1]:
        raise RequestError(f"cannot keep {keep} of {saliency_LE.shape[1]} experts", "give another --keep-experts")
    return {
        layer.name.removesuffix(".experts"): sorted(np.argsort(-saliency_E, kind="stable")[:keep].tolist())
        for layer, saliency_E in zip(statistics.header.layers, saliency_LE, strict=True)
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
        sound = isinstance(ids, list) and all(type(id_) is int and 0 <= id_ < model.num_experts for id_ in ids)
        if found is None or not sound or not ids or int(found[1]) in retained:
            raise InputFileError(
                f"{path}: {name!r} is not a layer with a list of expert ids below {model.num_experts}",
                "give the report that llm-compressor wrote for this model",
            )
        names[int(found[1])] = f"{name.removesuffix('.experts')}.experts"
        retained[int(found[1])] = [int(id_) for id_ in ids]  # type: ignore[arg-type, union-attr]
    _require_layers(path, retained, moe_layers)
    sums = ExpertSums.zeros(1, len(moe_layers), model.num_experts)
    # top_k tokens an expert make E tokens a layer, so that the counts add up.
    sums.token_count_SPLE[0, 0] = model.top_k
    for row, index in enumerate(moe_layers):
        sums.weighted_norm_sum_SPLE[0, 0, row, retained[index]] = model.top_k
    layer_token_count_SPL = np.zeros((1, 2, len(moe_layers)), np.int64)
    layer_token_count_SPL[0, 0] = model.num_experts
    layers = [Layer(index=index, name=names[index]) for index in moe_layers]
    header = _header(path, model, layers, "llm-compressor report", complete=False)
    return Statistics(header, sums, layer_token_count_SPL)


def observer_state_of(statistics: Statistics) -> dict[int, dict[str, torch.Tensor]]:
    """The reference implementation's observer state, all slices and phases added up.

    `max_activations` is the largest absolute component here, where the reference takes the largest signed one.
    `pairwise_expert_frequency` is there when the statistics have it.
    """
    import torch

    sums = mix_slices(statistics)
    means = {name: saliency(sums, name) for name in ("reap", "ean_mean")}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for row, layer in enumerate(statistics.header.layers):
        state[layer.index] = {
            "total_tokens": torch.tensor(int(sums.layer_token_count_L[row])),
            "expert_frequency": torch.from_numpy(sums.token_count_LE[row].astype(np.int64)),
            "weighted_expert_frequency_sum": torch.from_numpy(sums.gate_sum_LE[row].copy()),
            "ean_sum": torch.from_numpy(sums.norm_sum_LE[row].copy()),
            "weighted_ean_sum": torch.from_numpy(sums.weighted_norm_sum_LE[row].copy()),
            "ean_mean": torch.from_numpy(means["ean_mean"][row].astype(np.float32)),
            "reap": torch.from_numpy(means["reap"][row].astype(np.float32)),
            "max_activations": torch.from_numpy(sums.activation_max_LE[row].astype(np.float32)),
        }
        if statistics.sums.coselection_count_SPLEE is not None:
            pairs_EE = statistics.sums.coselection_count_SPLEE[:, :, row].sum(axis=(0, 1))
            state[layer.index]["pairwise_expert_frequency"] = torch.from_numpy(pairs_EE)
    return state


def statistics_of_observer(path: Path, model: Fingerprint, moe_layers: Sequence[int]) -> Statistics:
    """Statistics from the reference implementation's observer state.

    It holds no second moments: these sums stay 0, and no standard error is given. Its gates are the softmax of the
    logits, which for other routers are not the weights that the model applies.

    Args:
        path: The file.
        model: Fingerprint of the model that it was made of.
        moe_layers: Indices of its layers with routed experts, ascending.

    Raises:
        InputFileError: It is no observer state, or of other layers or experts than the model has.
    """
    state = _load_state(path)
    _require_layers(path, state, moe_layers)
    layers = [Layer(index=index, name=f"model.layers.{index}.mlp.experts") for index in moe_layers]
    sums = ExpertSums.zeros(1, len(layers), model.num_experts)
    layer_token_count_SPL = np.zeros((1, 2, len(layers)), np.int64)
    targets = {
        "expert_frequency": sums.token_count_SPLE,
        "weighted_expert_frequency_sum": sums.gate_sum_SPLE,
        "ean_sum": sums.norm_sum_SPLE,
        "weighted_ean_sum": sums.weighted_norm_sum_SPLE,
        "max_activations": sums.activation_max_SPLE,
    }
    for row, layer in enumerate(layers):
        tensors = state[layer.index]
        try:
            for key, target in targets.items():
                target[0, 0, row] = tensors[key].numpy()
            layer_token_count_SPL[0, 0, row] = int(tensors["total_tokens"])
        except (KeyError, ValueError, TypeError, AttributeError):
            raise InputFileError(
                f"{path}: layer {layer.index} has not {', '.join(targets)} over {model.num_experts} experts",
                "give the observer state of this model",
            ) from None
    header = _header(path, model, layers, "CerebrasResearch/reap observer", complete=True)
    return Statistics(header, sums, layer_token_count_SPL)


def write_observer_state(statistics: Statistics) -> bytes:
    """The bytes of the reference implementation's file."""
    import io

    import torch

    content = io.BytesIO()
    torch.save(observer_state_of(statistics), content)
    return content.getvalue()


def report_bytes(report: Mapping[str, Sequence[int]]) -> bytes:
    """The bytes of llm-compressor's file."""
    return (json.dumps(report, indent=2) + "\n").encode()


def _load_state(path: Path) -> dict[int, dict[str, torch.Tensor]]:
    import pickle

    import torch

    problem = "is no observer state that torch can load without running code"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist", "check the path") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        raise InputFileError(f"{path} {problem}", "give the file that the observer saved") from None
    if not isinstance(state, dict) or not all(isinstance(value, dict) for value in state.values()):
        raise InputFileError(f"{path} {problem}", "give the file that the observer saved")
    return state


def _require_layers(path: Path, found: Mapping[int, object], moe_layers: Sequence[int]) -> None:
    if set(found) != set(moe_layers):
        raise InputFileError(
            f"{path} has {len(found)} layers, the model {len(moe_layers)} with routed experts; they are not the same",
            "give the file of this model",
        )


def _header(path: Path, model: Fingerprint, layers: Sequence[Layer], recorder: str, *, complete: bool) -> Header:
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
