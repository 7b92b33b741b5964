"""What pruning must know of a family of models, as data read from `definitions/<family>.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reap_serve.architectures.moe_layers import MoeLayers
from reap_serve.architectures.values import first_number, shared_count
from reap_serve.errors import ArchitectureError
from reap_serve.records import JsonValue, Record

EXPERT_COUNT_KEYS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
MAX_LAYERS = 10_000
MAX_EXPERTS = 100_000


@dataclass(frozen=True, slots=True)
class RoutingLimits:
    """What a model's configuration says of its routed experts.

    Attributes:
        num_experts: Routed experts per layer.
        top_k: Experts chosen per token.
        num_groups: Groups the router chooses from first, 1 when it does not.
        top_k_groups: Groups chosen per token.
        moe_layers: Indices of the decoder layers that have routed experts, ascending.
        layer_counts: Routed experts of each decoder layer where they differ; `num_experts` is their largest then.
    """

    num_experts: int
    top_k: int
    num_groups: int
    top_k_groups: int
    moe_layers: tuple[int, ...]
    layer_counts: tuple[int, ...] | None = None

    def experts_in(self, layer: int) -> int:
        """Routed experts of a layer; a multi-token-prediction layer has `num_experts`."""
        if self.layer_counts is None or layer >= len(self.layer_counts):
            return self.num_experts
        return self.layer_counts[layer]


class Mtp(Record):
    """The multi-token-prediction layers of a family, which draft for the trunk.

    Attributes:
        layers: Templates of a layer's name, with `{layer}` counted from 0; empty when they follow the trunk's layers
            under the same name, as layer `num_hidden_layers` and on.
        prefixes: Beginnings of the names of all tensors that belong to them; empty when `layers` is.
        count_keys: Keys of their number; set to 0 when they are dropped.
    """

    layers: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    count_keys: tuple[str, ...] = ("num_nextn_predict_layers",)


class Architecture(Record):
    """A family of models. Names of tensors stand below the layer, such as `mlp.gate.weight`.

    Attributes:
        model_type: Name of the family, and `model_type` in its configurations.
        model_types: Further values of `model_type` that mean this family, such as that of a nested text configuration.
        text_config_keys: Keys under which a multimodal configuration holds the decoder's; the first present is read.
        layers: Templates of a decoder layer's name in the checkpoint, with `{layer}`.
        num_layers_keys: Keys that hold the number of decoder layers; a list of layers may stand in for them.
        num_experts_keys: Keys that hold the expert count.
        top_k_keys: Keys that hold top-k.
        num_groups_keys: Keys that hold the number of groups.
        top_k_groups_keys: Keys that hold the number of groups chosen.
        moe_layers: Which layers have experts.
        router: The tensor with one row an expert, and the axis of the experts.
        sliced: Further tensors with one entry an expert, and the axis of the experts. They may be absent.
        experts: Template of an expert's name, with `{expert}`, where each expert has tensors of its own.
        projections: Linear maps below an expert; each must have a weight in the checkpoint.
        stacked: Tensors that hold all experts, and the axis of the experts. Quantised variants continue the name with
            `_` or `.`, such as `_blocks` and `_scales`, and count experts on the same axis.
        carried: Tensors of the router and experts that do not depend on the number of experts.
        routed_modules: Modules in which an unknown tensor is an error and not carried.
        zero_experts_key: Key of the number of router rows, after the experts', that stand for no expert.
        hash_table: A table of expert ids by token id: its experts cannot be dropped.
        mtp: Multi-token-prediction layers, None when the family has none.
        expert_hidden_keys: Keys of the experts' input width where that may differ from the router's; absent or null is
            the router's.
        layer_counts_key: Key of a list of expert counts, one a decoder layer and 0 for a dense one, that vLLM reads
            with the family's patch in `patches/`; None where layers must not differ.
    """

    model_type: str
    model_types: tuple[str, ...] = ()
    text_config_keys: tuple[str, ...] = ("text_config", "llm_config", "language_config")
    layers: tuple[str, ...] = (
        "model.layers.{layer}",
        "model.language_model.layers.{layer}",
        "language_model.model.layers.{layer}",
    )
    num_layers_keys: tuple[str, ...] = ("num_hidden_layers",)
    num_experts_keys: tuple[str, ...] = EXPERT_COUNT_KEYS
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    num_groups_keys: tuple[str, ...] = ()
    top_k_groups_keys: tuple[str, ...] = ()
    moe_layers: MoeLayers = MoeLayers()
    router: dict[str, int]
    sliced: dict[str, int] = {}
    experts: str | None = None
    projections: tuple[str, ...] = ()
    stacked: dict[str, int] = {}
    carried: tuple[str, ...] = ()
    routed_modules: tuple[str, ...]
    zero_experts_key: str | None = None
    hash_table: str | None = None
    mtp: Mtp | None = None
    expert_hidden_keys: tuple[str, ...] = ()
    layer_counts_key: str | None = None

    def text_path(self, config: Mapping[str, JsonValue]) -> tuple[str, ...]:
        """Keys that lead from the top of config.json to the decoder's part; empty when it is the top."""
        for key in self.text_config_keys:
            part: JsonValue = config
            path = tuple(key.split("."))
            for step in path:
                part = part.get(step) if isinstance(part, Mapping) else None
            if isinstance(part, Mapping):
                return path
        return ()

    def text_config(self, config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        """The part of config.json that describes the decoder."""
        part = config
        for key in self.text_path(config):
            value = part[key]
            assert isinstance(value, Mapping)
            part = value
        return part

    def limits(self, config: Mapping[str, JsonValue]) -> RoutingLimits:
        """The routing limits of one model of this family.

        Raises:
            ArchitectureError: The model is dense, or its configuration lacks a number or contradicts itself.
        """
        text = self.text_config(config)
        num_experts = shared_count(text, self.num_experts_keys, MAX_EXPERTS)
        if not num_experts:
            keys = ", ".join(self.num_experts_keys)
            raise ArchitectureError(f"config.json names no routed experts ({keys})", "is this a dense model?")
        top_k = shared_count(text, self.top_k_keys, num_experts)
        num_layers = self.num_layers(config)
        if not top_k:
            raise ArchitectureError(f"config.json has none of {', '.join(self.top_k_keys)}", "mend config.json")
        num_groups = shared_count(text, self.num_groups_keys, num_experts) or 1
        top_k_groups = shared_count(text, self.top_k_groups_keys, num_groups) or num_groups
        if num_experts % num_groups:
            raise ArchitectureError(
                f"config.json divides {num_experts} experts into {num_groups} groups of unequal size",
                "mend config.json",
            )
        moe_layers = self.moe_layers.indices(text, num_layers)
        counts = self._layer_counts(text, num_layers)
        if counts is not None and any(not top_k <= counts[layer] <= num_experts for layer in moe_layers):
            raise ArchitectureError(
                f"config.json: {self.layer_counts_key} has a count outside {top_k}..{num_experts}", "mend config.json"
            )
        return RoutingLimits(num_experts, top_k, num_groups, top_k_groups, moe_layers, counts)

    def _layer_counts(self, text: Mapping[str, JsonValue], num_layers: int) -> tuple[int, ...] | None:
        stated = None if self.layer_counts_key is None else text.get(self.layer_counts_key)
        if stated is None:
            return None
        counts = tuple(count for count in stated if type(count) is int) if isinstance(stated, list) else ()
        if not isinstance(stated, list) or len(counts) != len(stated) or len(counts) != num_layers:
            raise ArchitectureError(
                f"config.json: {self.layer_counts_key} is not a list of {num_layers} counts", "mend config.json"
            )
        return counts

    def num_layers(self, config: Mapping[str, JsonValue]) -> int:
        """Decoder layers of the trunk.

        Raises:
            ArchitectureError: The number is missing or outside 1..10000.
        """
        text = self.text_config(config)
        num_layers = first_number(text, self.num_layers_keys, self.moe_layers.num_described(text))
        if not 0 < num_layers <= MAX_LAYERS:
            raise ArchitectureError(
                f"config.json: num_hidden_layers is {num_layers}, outside 1..{MAX_LAYERS}", "mend config.json"
            )
        return num_layers

    def zero_experts(self, config: Mapping[str, JsonValue]) -> int:
        """Router rows after the experts' that stand for no expert."""
        keys = () if self.zero_experts_key is None else (self.zero_experts_key,)
        return first_number(self.text_config(config), keys, 0)
