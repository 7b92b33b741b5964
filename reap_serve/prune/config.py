"""The configuration files of the output: every alias of the expert count, MTP keys, names of quantised modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from reap_serve.architectures.spec import EXPERT_COUNT_KEYS, Architecture
from reap_serve.errors import ArchitectureError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.modules import ModuleCut
from reap_serve.records import JsonValue


def pruned_config(
    config: Mapping[str, JsonValue], architecture: Architecture, modules: ModuleCut
) -> dict[str, JsonValue]:
    """config.json of the output.

    Raises:
        ArchitectureError: The quantisation configuration chooses experts by patterns of their numbers, or layers keep
            different numbers and no vLLM serves that.
    """
    cut = modules.cut
    result = copy.deepcopy(dict(config))
    before, after = cut.limits.num_experts, cut.num_kept
    text = result
    for key in architecture.text_path(config):
        value = text[key]
        assert isinstance(value, dict)
        text = value
    # The top of a multimodal configuration may repeat the decoder's counts; vLLM reads whichever it meets first.
    for part in [text] if text is result else [text, result]:
        for key in {*architecture.num_experts_keys, *EXPERT_COUNT_KEYS}:
            if key in part:
                part[key] = _replaced_count(part[key], before, after)
        if part is text and not cut.is_uniform:
            part[_layer_counts_key(architecture)] = [
                len(cut.kept.get(layer, ())) for layer in range(architecture.num_layers(config))
            ]
        if cut.mtp is MtpChoice.DROP and architecture.mtp is not None:
            part.update({key: 0 for key in architecture.mtp.count_keys if key in part})
    cleaned = modules.clean(result, experts_only=True)
    assert isinstance(cleaned, dict)
    return cleaned


def _layer_counts_key(architecture: Architecture) -> str:
    if architecture.layer_counts_key is None:
        raise ArchitectureError(
            f"no patch lets vLLM serve different numbers of experts in the layers of {architecture.model_type}",
            "make the plan with --budget uniform",
        )
    return architecture.layer_counts_key


def _replaced_count(value: JsonValue, before: int, after: int) -> JsonValue:
    if isinstance(value, list):
        return [after if number == before else number for number in value]
    return after if value == before and not isinstance(value, bool) else value
