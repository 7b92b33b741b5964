"""Tensor names of one model: which layer and expert a tensor belongs to, and what pruning does with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from reap_serve.architectures.spec import Architecture

NUMBER = r"(?:0|[1-9]\d{0,5})"

# What a linear map has beside `weight`, or in its place, when it is quantised: compressed-tensors, FP8, ModelOpt, GPTQ,
# AWQ, Quark; and its bias.
LINEAR_PARTS = frozenset(
    {
        "bias",
        "g_idx",
        "input_global_scale",
        "input_scale",
        "input_zero_point",
        "output_scale",
        "qweight",
        "qzeros",
        "scales",
        "weight",
        "weight_g_idx",
        "weight_global_scale",
        "weight_packed",
        "weight_scale",
        "weight_scale_2",
        "weight_scale_inv",
        "weight_shape",
        "weight_zero_point",
    }
)


class Kind(Enum):
    """What a tensor is to the router and the experts of its layer."""

    OTHER = "other"
    ROUTER = "router"
    ROUTER_PART = "part of a router"
    SLICED = "sliced"
    EXPERT = "expert"
    STACKED = "stacked"
    HASH_TABLE = "hash table"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Role:
    """The part that a tensor plays.

    Attributes:
        kind: What it is.
        layer: Index of its layer, None outside the layers.
        is_mtp: Whether it belongs to a multi-token-prediction layer.
        axis: Axis of the experts, for router, sliced and stacked tensors.
        expert: Its expert, for tensors of one expert.
        prefix: The name up to the expert's number.
        suffix: The name after the expert's number and a dot, or below the layer for other kinds.
    """

    kind: Kind
    layer: int | None = None
    is_mtp: bool = False
    axis: int = 0
    expert: int | None = None
    prefix: str = ""
    suffix: str = ""

    @property
    def is_routed(self) -> bool:
        """Whether the tensor belongs to the router or the experts."""
        return self.kind is not Kind.OTHER


class TensorNames:
    """Finds the role of each tensor of a family.

    Args:
        architecture: The family.
        num_layers: Decoder layers of the trunk; layers after them are multi-token-prediction layers.
    """

    def __init__(self, architecture: Architecture, num_layers: int) -> None:
        self._architecture = architecture
        self._num_layers = num_layers
        mtp = architecture.mtp
        self._trunk = _layer_pattern(architecture.layers)
        self._mtp = _layer_pattern(mtp.layers) if mtp is not None and mtp.layers else None
        self._mtp_prefixes = mtp.prefixes if mtp is not None else ()
        self._expert = _expert_pattern(architecture.experts) if architecture.experts is not None else None
        parts = (*architecture.router, *architecture.stacked, architecture.experts or "")
        holders = {part.split(".")[0] for part in parts} | {"mlp", "moe"}
        self._module = re.compile(
            rf"(?:{_alternatives((*architecture.layers, *Architecture.model_fields['layers'].default))})"
            rf"(?P<layer>{NUMBER})\.(?:{'|'.join(sorted(map(re.escape, holders - {''})))})(?:\..+)?"
        )
        self._guard = tuple(f"{module}." for module in architecture.routed_modules)
        self._linear_routers = {
            name.removesuffix("weight"): axis for name, axis in architecture.router.items() if name.endswith(".weight")
        }

    def role(self, name: str) -> Role:
        """The role of a tensor, or of a module when a suffix such as `.weight` is left out below an expert."""
        if self._mtp is not None and (match := self._mtp.fullmatch(name)):
            return self._below_layer(name, match["rest"], int(match["layer"]), is_mtp=True)
        if match := self._trunk.fullmatch(name):
            layer = int(match["layer"])
            return self._below_layer(name, match["rest"], layer, is_mtp=layer >= self._num_layers)
        return Role(Kind.OTHER, is_mtp=name.startswith(self._mtp_prefixes) if self._mtp_prefixes else False)

    def is_layer(self, module: str, index: int) -> bool:
        """Whether a module's name is that of a layer's experts, as the checkpoint, vLLM or transformers calls them.

        The three agree on where the layer's number stands, and differ in what comes before it and in the name of the
        module that holds the experts: transformers calls it `mlp` in most families, whatever the checkpoint does.
        """
        found = self._module.fullmatch(module)
        return found is not None and int(found["layer"]) == index

    def role_below(self, rest: str) -> Role:
        """The role of a name below a layer, whichever layer it is."""
        return self._below_layer(rest, rest, None, is_mtp=False)

    def _below_layer(self, name: str, rest: str, layer: int | None, *, is_mtp: bool) -> Role:
        family = self._architecture
        if rest in family.router:
            return Role(Kind.ROUTER, layer, is_mtp, family.router[rest], suffix=rest)
        if rest in family.sliced:
            return Role(Kind.SLICED, layer, is_mtp, family.sliced[rest], suffix=rest)
        if rest == family.hash_table:
            return Role(Kind.HASH_TABLE, layer, is_mtp, suffix=rest)
        if self._expert is not None and (found := self._expert.fullmatch(rest)):
            start = len(name) - len(rest) + found.start("expert")
            return Role(Kind.EXPERT, layer, is_mtp, 0, int(found["expert"]), name[:start], found["suffix"])
        for stacked, axis in family.stacked.items():
            if rest == stacked or rest.startswith((f"{stacked}_", f"{stacked}.")):
                return Role(Kind.STACKED, layer, is_mtp, axis, suffix=rest)
        for router, axis in self._linear_routers.items():
            if rest.startswith(router) and rest[len(router) :] in LINEAR_PARTS:
                return Role(Kind.ROUTER_PART, layer, is_mtp, axis, suffix=rest)
        known = rest in family.carried or not rest.startswith(self._guard)
        return Role(Kind.OTHER if known else Kind.UNKNOWN, layer, is_mtp, suffix=rest)


def _layer_pattern(templates: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?:{_alternatives(templates)})(?P<layer>{NUMBER})\.(?P<rest>.+)")


def _alternatives(templates: tuple[str, ...]) -> str:
    return "|".join(re.escape(template.removesuffix("{layer}")) for template in templates)


def _expert_pattern(template: str) -> re.Pattern[str]:
    before, _, after = template.partition("{expert}")
    return re.compile(rf"{re.escape(before)}(?P<expert>{NUMBER}){re.escape(after)}\.(?P<suffix>.+)")
