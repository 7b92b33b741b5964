"""`recipe.yaml` of llm-compressor: how a checkpoint was quantised. No engine reads it; people and tools do."""

from __future__ import annotations

import json
from pathlib import Path

from reap_serve.errors import ReapServeError
from reap_serve.prune.modules import ModuleCut

RECIPE_NAME = "recipe.yaml"
MAX_BYTES = 16 << 20


def is_outdated(recipe: Path, modules: ModuleCut) -> bool:
    """Whether a recipe names experts that the cut drops or renumbers, or cannot be read and may do so."""
    import yaml

    try:
        if recipe.stat().st_size > MAX_BYTES:
            return True
        text = recipe.read_text("utf-8")
        # Aliases make a short text as long as one likes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return True
        value = json.loads(json.dumps(yaml.safe_load(text), default=str))
        return bool(modules.clean(value) != value)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, ReapServeError):
        return True
