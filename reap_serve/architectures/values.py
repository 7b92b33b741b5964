"""Numbers out of config.json, which may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reap_serve.errors import ArchitectureError
from reap_serve.records import JsonValue


def first_number(config: Mapping[str, JsonValue], keys: Sequence[str], default: int) -> int:
    """The whole number at the first key that is present and not null, or `default`."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, Sequence) and not isinstance(value, str):
            # `moe_layer_freq` and its like are a number in some checkpoints and a list in others.
            continue
    return default


def shared_count(config: Mapping[str, JsonValue], keys: Sequence[str], limit: int) -> int | None:
    """The count on which all present keys agree; a list per layer counts as its one repeated value.

    Returns:
        None when no key is present or all are null.

    Raises:
        ArchitectureError: Two keys or two layers disagree, or the count is outside 1..`limit`.
    """
    found: dict[str, int] = {}
    for key in keys:
        value = config.get(key)
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for number in values:
            if number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= limit:
                raise ArchitectureError(f"config.json: {key} is {number!r}, outside 0..{limit}", "mend config.json")
            if found.setdefault(key, number) != number:
                raise ArchitectureError(
                    f"config.json: {key} is a list of different counts ({found[key]} and {number})",
                    "only one count for all layers can be served by stock vLLM",
                )
    if len(set(found.values())) > 1:
        stated = ", ".join(f"{key}={number}" for key, number in found.items())
        raise ArchitectureError(f"config.json contradicts itself: {stated}", "make them equal")
    return next(iter(found.values()), None)
