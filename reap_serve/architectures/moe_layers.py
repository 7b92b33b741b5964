"""Which decoder layers have routed experts, as families write it in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from reap_serve.architectures.values import first_number
from reap_serve.errors import ArchitectureError
from reap_serve.records import JsonValue, Record


class MoeLayers(Record):
    """The rule of a family.

    A list or pattern that names every layer decides alone. Otherwise layer i has experts when
    `first <= i <= last`, `(i - offset + step_phase) % step == 0`, and i is in no list of dense layers.

    Attributes:
        marks: Key of a per-layer list or string to the elements that mean routed experts, such as
            `{"mlp_layer_types": ["sparse"]}`; the first key present is read.
        listed_keys: Keys of a list of the indices of layers with experts.
        first_keys: Keys of the first layer with experts; the first one present is read.
        last_keys: Keys of the last layer with experts; -1 or absent is the last of the model.
        step_keys: Keys of the distance between layers with experts.
        step_phase: 1 when layer `step - 1` is the first of a period to have experts, 0 when layer 0 is.
        offset_keys: Keys of the first layer of the first period to have experts.
        dense_keys: Keys of a list of the indices of dense layers.
        enabled_key: Key of a switch that turns experts off in the whole model.
    """

    marks: dict[str, tuple[JsonValue, ...]] = {}
    listed_keys: tuple[str, ...] = ()
    first_keys: tuple[str, ...] = ()
    last_keys: tuple[str, ...] = ()
    step_keys: tuple[str, ...] = ()
    step_phase: Literal[0, 1] = 1
    offset_keys: tuple[str, ...] = ()
    dense_keys: tuple[str, ...] = ()
    enabled_key: str | None = None

    def indices(self, text: Mapping[str, JsonValue], num_layers: int) -> tuple[int, ...]:
        """Indices of the layers with routed experts, ascending.

        Raises:
            ArchitectureError: The configuration contradicts itself, or no layer has experts.
        """
        if self.enabled_key is not None and not text.get(self.enabled_key):
            raise ArchitectureError(
                f"config.json sets {self.enabled_key} to false: the model is dense", "nothing to do"
            )
        found = self._marked(text, num_layers)
        if found is None:
            found = self._listed(text, num_layers)
        if found is None:
            found = self._periodic(text, num_layers)
        if not found:
            raise ArchitectureError("config.json gives no layer routed experts", "is this a Mixture-of-Experts model?")
        return found

    def num_described(self, text: Mapping[str, JsonValue]) -> int:
        """Layers that a list or pattern describes, 0 when the configuration has none."""
        return next((len(marks) for key in self.marks if isinstance(marks := text.get(key), Sequence)), 0)

    def _marked(self, text: Mapping[str, JsonValue], num_layers: int) -> tuple[int, ...] | None:
        for key, values in self.marks.items():
            marks = text.get(key)
            if isinstance(marks, Sequence):
                if len(marks) < num_layers:
                    raise ArchitectureError(
                        f"config.json: {key} describes {len(marks)} of {num_layers} layers", "mend config.json"
                    )
                return tuple(index for index in range(num_layers) if marks[index] in values)
        return None

    def _listed(self, text: Mapping[str, JsonValue], num_layers: int) -> tuple[int, ...] | None:
        for key in self.listed_keys:
            listed = text.get(key)
            if isinstance(listed, str):
                listed = [int(part) for part in listed.split(",") if part.strip().isdigit()]
            if isinstance(listed, Sequence):
                return tuple(index for index in range(num_layers) if index in listed)
        return None

    def _periodic(self, text: Mapping[str, JsonValue], num_layers: int) -> tuple[int, ...]:
        first = first_number(text, self.first_keys, 0)
        last = first_number(text, self.last_keys, num_layers - 1)
        step = first_number(text, self.step_keys, 1)
        shift = self.step_phase - first_number(text, self.offset_keys, 0)
        dense: set[int] = set()
        for key in self.dense_keys:
            listed = text.get(key)
            if isinstance(listed, Sequence):
                if not all(isinstance(index, int) for index in listed):
                    raise ArchitectureError(f"config.json: {key} holds what is no layer's index", "mend config.json")
                dense |= {index for index in listed if isinstance(index, int)}
        if step < 1:
            raise ArchitectureError(f"config.json: {self.step_keys[0]} is {step}", "mend config.json")
        end = num_layers if last < 0 else min(last + 1, num_layers)
        return tuple(index for index in range(max(first, 0), end) if (index + shift) % step == 0 and index not in dense)
