"""The configuration files of the output: every alias of the expert count, MTP keys, names of quantised modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

from reap_serve.architectures.names import Kind, TensorNames
from reap_serve.architectures.spec import EXPERT_COUNT_KEYS, Architecture
from reap_serve.errors import ArchitectureError
from reap_serve.prune.decide import Cut, MtpChoice
from reap_serve.records import JsonValue

# Lists of module names, wherever they stand in a quantisation configuration: compressed-tensors, FP8, AWQ and its like,
# ModelOpt.
MODULE_LISTS = frozenset(
    {"ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules", "targets", "modules_in_block_to_quantize"}
)
# Maps from module names: ModelOpt mixed precision, auto-round, GPTQModel.
MODULE_MAPS = frozenset({"quantized_layers", "extra_config", "dynamic"})
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
EXPERT_NUMBER = re.compile(r"experts(?:\\)?\.(?:\d|\(|\[)")

RenameModule = Callable[[str], str | None]


def pruned_config(
    config: Mapping[str, JsonValue], architecture: Architecture, names: TensorNames, cut: Cut
) -> dict[str, JsonValue]:
    """config.json of the output.

    Raises:
        ArchitectureError: The quantisation configuration chooses experts by patterns of their numbers, or layers keep
            different numbers and no vLLM serves that.
    """
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
        for key in QUANTIZATION_KEYS:
            if key in part:
                part[key] = clean_modules(part[key], module_renamer(names, cut))
    return result


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


def module_renamer(names: TensorNames, cut: Cut) -> RenameModule:
    """From a module's name in the source to its name in the output, None when it is gone."""

    def rename(module: str) -> str | None:
        # An expert itself, `experts.3`, has no name below it: give it one.
        role = names.role(module)
        if role.kind is not Kind.EXPERT:
            role = names.role(f"{module}.weight")
        if role.is_mtp and cut.mtp is MtpChoice.DROP:
            return None
        if role.kind is not Kind.EXPERT or role.layer is None or role.expert is None:
            return module
        kept = cut.kept_in(role.layer, role.is_mtp)
        if kept is None:
            return module
        if role.expert not in kept:
            return None
        return f"{role.prefix}{kept.index(role.expert)}{module[len(role.prefix) + len(str(role.expert)) :]}"

    return rename


def clean_modules(value: JsonValue, rename: RenameModule) -> JsonValue:
    """A quantisation configuration in which every named module exists.

    Raises:
        ArchitectureError: A pattern names experts by number: renumbering would change its meaning.
    """
    if not isinstance(value, Mapping):
        return value
    result: dict[str, JsonValue] = {}
    for key, entry in value.items():
        if key in MODULE_LISTS and isinstance(entry, Sequence) and not isinstance(entry, str):
            result[key] = [each for each in (_renamed(module, rename) for module in entry) if each is not None]
        elif key in MODULE_MAPS and isinstance(entry, Mapping):
            renamed = ((_renamed(module, rename), setting) for module, setting in entry.items())
            result[key] = {module: setting for module, setting in renamed if isinstance(module, str)}
        elif isinstance(entry, Mapping):
            result[key] = clean_modules(entry, rename)
        else:
            result[key] = entry
    return result


def _renamed(module: JsonValue, rename: RenameModule) -> JsonValue:
    if not isinstance(module, str):
        return module
    if not re.fullmatch(r"[\w.\-]+", module):
        if EXPERT_NUMBER.search(module):
            raise ArchitectureError(
                f"the quantisation configuration names experts by the pattern {module!r}",
                "replace it by the modules' full names",
            )
        return module
    return rename(module)
