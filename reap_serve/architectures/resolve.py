"""config.json to the family that describes it. An unknown family is an error, never a guess."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources

from reap_serve.architectures.spec import Architecture
from reap_serve.errors import ArchitectureError
from reap_serve.records import JsonValue

NESTED_CONFIGS = ("text_config", "llm_config", "language_config")


@functools.cache
def known_architectures() -> dict[str, Architecture]:
    """Every family, by its name."""
    found: dict[str, Architecture] = {}
    for file in resources.files("reap_serve.architectures").joinpath("definitions").iterdir():
        if file.name.endswith(".json"):
            architecture = Architecture.model_validate(json.loads(file.read_text()))
            found[architecture.model_type] = architecture
    return dict(sorted(found.items()))


@functools.cache
def _families_by_model_type() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for architecture in known_architectures().values():
        for model_type in (architecture.model_type, *architecture.model_types):
            assert model_type not in found, f"{model_type} is claimed by two families"
            found[model_type] = architecture
    return found


@functools.cache
def refused_model_types() -> dict[str, str]:
    """Families that cannot be pruned, and why."""
    text = resources.files("reap_serve.architectures").joinpath("refused.json").read_text()
    return dict(json.loads(text))


def resolve(config: Mapping[str, JsonValue]) -> Architecture:
    """The family of a configuration: by its own model_type, else by that of the text configuration inside it.

    Raises:
        ArchitectureError: The model_type is missing or unknown, which lists what exists; or known and refused.
    """
    families = _families_by_model_type()
    nested = (part.get("model_type") for key in NESTED_CONFIGS if isinstance(part := config.get(key), Mapping))
    for model_type in (config.get("model_type"), *nested):
        if isinstance(model_type, str) and model_type in families:
            return families[model_type]
        if isinstance(model_type, str) and model_type in refused_model_types():
            raise ArchitectureError(
                f"{model_type} cannot be pruned: {refused_model_types()[model_type]}", "prune another model"
            )
    raise ArchitectureError(
        f"model_type {config.get('model_type')!r} is not a Mixture-of-Experts family that reap-serve knows",
        f"known are {', '.join(known_architectures())}",
    )
