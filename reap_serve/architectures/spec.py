"""What pruning must know of a family of models, as data read from `definitions/<family>.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reap_serve.errors import ArchitectureError
from reap_serve.records import JsonValue, Record


@dataclass(frozen=True, slots=True)
class RoutingLimits:
    """What a model's configuration says of its routed experts.

    Attributes:
        num_experts: Routed experts per layer.
        top_k: Experts chosen per token.
        num_groups: Groups the router chooses from first, 1 when it does not.
        top_k_groups: Groups chosen per token.
        moe_layers: Indices of the decoder layers that have routed experts, ascending.
    """

    num_experts: int
    top_k: int
    num_groups: int
    top_k_groups: int
    moe_layers: tuple[int, ...]


class Architecture(Record):
    """A family of models.

    Attributes:
        model_type: `model_type` of the configuration that holds the expert count.
        text_config_key: Key of the text configuration in a multimodal one, None when it stands at the top.
        num_experts_keys: Keys that hold the expert count; every one that is present is updated.
        top_k_keys: Keys that hold top-k; the first one present is read.
        layer: Template of the MoE block's name in the checkpoint, with `{layer}`.
        expert_tensors: Names below the block, with `{expert}`, of per-expert tensors (regular expressions).
        sliced_tensors: Names below the block (regular expressions) to the axis that counts experts.
    """

    model_type: str
    text_config_key: str | None = None
    num_experts_keys: tuple[str, ...]
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    layer: str
    expert_tensors: tuple[str, ...] = ()
    sliced_tensors: dict[str, int] = {}

    def text_config(self, config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        """The part of config.json that describes the decoder."""
        if self.text_config_key is None:
            return config
        text = config.get(self.text_config_key)
        if not isinstance(text, Mapping):
            raise ArchitectureError(f"config.json has no {self.text_config_key}", "give a complete checkpoint")
        return text

    def limits(self, config: Mapping[str, JsonValue]) -> RoutingLimits:
        """The routing limits of one model of this family."""
        text = self.text_config(config)
        num_experts = _first_int(text, self.num_experts_keys)
        top_k = _first_int(text, self.top_k_keys)
        num_layers = _first_int(text, ("num_hidden_layers",))
        step = text.get("decoder_sparse_step", 1)
        dense = text.get("mlp_only_layers") or ()
        assert isinstance(step, int)
        assert isinstance(dense, (list, tuple))
        moe_layers = tuple(index for index in range(num_layers) if (index + 1) % step == 0 and index not in dense)
        return RoutingLimits(num_experts, top_k, 1, 1, moe_layers)


def _first_int(config: Mapping[str, JsonValue], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise ArchitectureError(f"config.json has none of {', '.join(keys)}", "is this a Mixture-of-Experts model?")
