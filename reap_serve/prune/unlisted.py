"""Tensors that depend on the experts and that the family does not list: found by meaning, wherever they stand.

A tensor means experts when a number in its name counts them (`experts.3.`), when the family's own names stand under
another root, when it stacks them, or when a name that speaks of routing has an axis as long as the layer has experts.
Shared experts and attention gates do not; nor does another decoder with experts of its own, which a part of config.json
of its own describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reap_serve.architectures.names import NUMBER, Kind, Role, TensorNames
from reap_serve.architectures.spec import EXPERT_COUNT_KEYS, Architecture
from reap_serve.records import JsonValue
from reap_serve.weight_headers import Tensor

NUMBERED_EXPERT = re.compile(rf"(?:^|\.)[^.]*experts?(?:_[a-z]\w*)?[._]{NUMBER}(?:\.|$)")
STACKED_EXPERTS = re.compile(r"(?:^|\.)[^.]*experts?(?:\.|$)")
MLX_EXPERTS = frozenset({"switch_mlp", "switch_glu"})
ROUTING_WORDS = ("expert", "router", "routing", "e_score_correction", "moe")
GATES = frozenset({"gate", "gating"})
ELSEWHERE = ("share", "attn", "attention")
# Parts of a configuration whose names say nothing of which model they describe.
GENERIC_STEMS = frozenset({"text", "llm", "language", "model", "quantization", "compression"})
MIN_COMMON_LETTERS = 3


@dataclass(frozen=True, slots=True)
class Unlisted:
    """A tensor that depends on the experts and is not listed.

    Attributes:
        what: What is wrong with it, with its name.
        remedy: What helps.
    """

    what: str
    remedy: str


class UnlistedNames:
    """Finds such tensors of one checkpoint.

    Args:
        architecture: The family.
        names: Its names.
        config: config.json.
    """

    def __init__(self, architecture: Architecture, names: TensorNames, config: Mapping[str, JsonValue]) -> None:
        self._architecture = architecture
        self._names = names
        text = architecture.text_config(config)
        hidden = text.get("hidden_size")
        self._hidden = hidden if isinstance(hidden, int) else 0
        self._decoders = tuple(_other_decoders(config, architecture))
        self._blocks = tuple({_block(router) for router in architecture.router})

    def find(self, tensor: Tensor, role: Role, rows: int, *, is_cut: bool = False) -> Unlisted | None:
        """What a tensor is, None when it does not depend on the experts or belongs to another decoder.

        Args:
            tensor: A tensor.
            role: Its role; only those of the kind OTHER can be unlisted.
            rows: Experts of its layer, 0 for a dense one; of the model outside the layers.
            is_cut: Whether the checkpoint is an output, in which an uncut vector has a length of its own.
        """
        if role.kind is not Kind.OTHER or role.suffix in self._architecture.carried:
            return None
        if role.layer is not None:
            return self._below_layer(tensor, role.suffix, rows, is_cut=is_cut)
        if self.of_another_decoder(tensor.name):
            return None
        remedy = "leave the draft layers out with --mtp drop, or report the checkpoint"
        if not role.is_mtp:
            remedy = "rename its tensors to a known root, remove them if nothing reads them, or report the checkpoint"
        if (root := self._foreign_root(tensor.name)) is not None:
            mtp = self._architecture.mtp
            templates = (*self._architecture.layers, *(() if mtp is None else mtp.layers))
            known = ", ".join(template.replace("{layer}", "N") for template in templates)
            return Unlisted(
                f"{tensor.name} stands below {root!r}: {self._architecture.model_type} is known below {known}", remedy
            )
        is_stack = len(tensor.shape) > 2 and STACKED_EXPERTS.search(tensor.name) and not _elsewhere(tensor.name)
        if is_stack or _is_numbered(tensor.name) or (_speaks_of_routing(tensor.name) and rows in tensor.shape):
            return Unlisted(f"{tensor.name} belongs to experts and {self._unknown()}", remedy)
        return None

    def _below_layer(self, tensor: Tensor, rest: str, rows: int, *, is_cut: bool) -> Unlisted | None:
        remedy = "report the checkpoint, or remove the tensor if nothing reads it"
        if MLX_EXPERTS.intersection(rest.split(".")):
            remedy = "this is a layout of MLX, which vLLM does not read: prune the checkpoint that it was made from"
        if _is_numbered(rest):
            return Unlisted(f"{tensor.name} belongs to an expert and {self._unknown()}", remedy)
        if not rows:
            return None
        speaks = _speaks_of_routing(rest)
        lengths = [length for length in tensor.shape if length != 1]
        is_vector = len(lengths) == 1
        in_block = not _elsewhere(rest) and any(block and rest.startswith(block) for block in self._blocks)
        is_stack = len(lengths) > 2 and lengths[0] == rows
        if rows in tensor.shape and (speaks or (in_block and (is_vector or is_stack))) and not is_cut:
            return Unlisted(
                f"{tensor.name} has {rows} entries, as many as the layer has experts, and {self._unknown()}", remedy
            )
        if is_cut and is_vector and (speaks or in_block) and lengths[0] not in (0, self._hidden, rows):
            return Unlisted(
                f"{tensor.name} has {lengths[0]} entries beside {rows} experts, and {self._unknown()}", remedy
            )
        return None

    def _unknown(self) -> str:
        return f"is unknown to the family {self._architecture.model_type}"

    def _foreign_root(self, name: str) -> str | None:
        """The root under which a name is one of the family's, None when it is none."""
        for match in re.finditer(rf"(?<![^.]){NUMBER}\.", name):
            if self._names.role_below(name[match.end() :]).kind not in (Kind.OTHER, Kind.UNKNOWN):
                return name[: match.start()]
        return None

    def of_another_decoder(self, name: str) -> bool:
        """Whether a name belongs to a decoder that a part of config.json of its own describes."""
        segments = name.split(".")[:4]
        return any(_resembles(stem, segment) for stem in self._decoders for segment in segments)


def _block(router: str) -> str:
    """The module that holds router and experts: `mlp.` for `mlp.gate.weight`."""
    return "" if router.count(".") < 2 else router.partition(".")[0] + "."


def _elsewhere(name: str) -> bool:
    return any(word in name for word in ELSEWHERE)


def _is_numbered(name: str) -> bool:
    match = NUMBERED_EXPERT.search(name)
    return match is not None and "share" not in match[0]


def _speaks_of_routing(name: str) -> bool:
    if _elsewhere(name):
        return False
    return any(word in name for word in ROUTING_WORDS) or not GATES.isdisjoint(name.split("."))


def _other_decoders(config: Mapping[str, JsonValue], architecture: Architecture) -> Iterator[str]:
    """Names of the parts of config.json, beside the decoder's, that state experts of their own."""
    own = architecture.text_path(config)
    keys = {*architecture.num_experts_keys, *EXPERT_COUNT_KEYS}

    def walk(part: Mapping[str, JsonValue], path: tuple[str, ...]) -> Iterator[str]:
        for key, value in part.items():
            here = (*path, key)
            if not isinstance(value, Mapping) or here == own:
                continue
            if own[: len(here)] != here and any(isinstance(value.get(count), int) for count in keys):
                yield from (stem for each in here if (stem := each.removesuffix("_config")) not in GENERIC_STEMS)
            yield from walk(value, here)

    return walk(config, ())


def _resembles(stem: str, segment: str) -> bool:
    return segment == stem or (len(stem) >= MIN_COMMON_LETTERS and segment.startswith(stem[:MIN_COMMON_LETTERS]))
