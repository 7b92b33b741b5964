"""Where two configurations differ, key by key and at any depth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from reap_serve.prune.findings import Finding, error
from reap_serve.records import JsonValue, strict_json

CONFIG_NAME = "config.json"
SHOWN = 80


def compare_configs(expected: Mapping[str, JsonValue], found: Mapping[str, JsonValue]) -> Iterator[Finding]:
    """An error for each key whose value is not the expected one; NaN, which JSON cannot hold, is null in both."""
    wanted, given = json.loads(strict_json(expected)), json.loads(strict_json(found))
    for path, left, right in _differences(wanted, given, ""):
        yield error("config", f"{CONFIG_NAME}: {path} is {right}, and not {left}, which the source and the plan give")


def _differences(
    left: Mapping[str, JsonValue], right: Mapping[str, JsonValue], path: str
) -> Iterator[tuple[str, str, str]]:
    for key in sorted(left.keys() | right.keys()):
        here = f"{path}{key}"
        if key not in left or key not in right:
            yield here, _shown(left, key), _shown(right, key)
            continue
        one, other = left[key], right[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{here}.")
        elif one != other or isinstance(one, bool) != isinstance(other, bool):
            yield here, _shown(left, key), _shown(right, key)


def _shown(part: Mapping[str, JsonValue], key: str) -> str:
    text = json.dumps(part[key]) if key in part else "absent"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
