"""config.json to the family that describes it. An unknown family is an error, never a guess."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources

from reap_serve.architectures.spec import Architecture
from reap_serve.errors import ArchitectureError
from reap_serve.records import JsonValue


@functools.cache
def known_architectures() -> dict[str, Architecture]:
    """Every family, by `model_type`."""
    found: dict[str, Architecture] = {}
    for file in resources.files("reap_serve.architectures").joinpath("definitions").iterdir():
        if file.name.endswith(".json"):
            architecture = Architecture.model_validate(json.loads(file.read_text()))
            found[architecture.model_type] = architecture
    return dict(sorted(found.items()))


def resolve(config: Mapping[str, JsonValue]) -> Architecture:
    """The family of a configuration.

    Raises:
        ArchitectureError: The model_type is missing or unknown; lists what exists.
    """
    model_type = config.get("model_type")
    known = known_architectures()
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise ArchitectureError(
        f"model_type {model_type!r} is not a Mixture-of-Experts family that reap-serve knows",
        f"known are {', '.join(known)}",
    )
