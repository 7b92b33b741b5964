"""Where two configurations differ, key by key and at any depth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import xxhash

from reap_serve.prune.findings import Finding, error
from reap_serve.prune.modules import QUANTIZATION_KEYS
from reap_serve.records import JsonValue, strict_json

CONFIG_NAME = "config.json"
SHOWN = 80
MANY = 5
# What nothing that serves reads; tools that save a configuration anew change them.
UNREAD = ("transformers_version", "_name_or_path", "_commit_hash")
ABSENT = "absent"
LONG = "xxh3_64:"


def compare_configs(expected: Mapping[str, JsonValue], found: Mapping[str, JsonValue]) -> Iterator[Finding]:
    """An error for each key whose value is not the expected one; NaN, which JSON cannot hold, is null in both."""
    wanted, given = json.loads(strict_json(expected)), json.loads(strict_json(found))
    for path, left, right in _differences(wanted, given, ""):
        yield error("config", f"{CONFIG_NAME}: {path} is {right}, and not {left}, which the source and the plan give")


def config_values(config: Mapping[str, JsonValue]) -> dict[str, str]:
    """Each value of a configuration as JSON text, by the path of its key; of a long one its digest.

    Names of modules can make a quantisation configuration longer than all else: it counts as one value.
    """
    return dict(_values(json.loads(strict_json(config)), ""))


def _values(part: Mapping[str, JsonValue], path: str) -> Iterator[tuple[str, str]]:
    for key, value in part.items():
        if isinstance(value, Mapping) and value and key not in QUANTIZATION_KEYS:
            yield from _values(value, f"{path}{key}.")
        elif key not in UNREAD:
            text = strict_json(_plain(value)).decode().strip()
            yield f"{path}{key}", text if len(text) <= SHOWN else f"{LONG}{xxhash.xxh3_64_hexdigest(text.encode())}"


def _plain(value: JsonValue) -> JsonValue:
    """The same with keys in order and whole numbers without a point: tools write them one way or the other."""
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def compare_values(expected: Mapping[str, str], config: Mapping[str, JsonValue]) -> Iterator[Finding]:
    """An error for each value that is not as it was written, the first ones by name."""
    found = config_values(config)
    changed = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    for key in changed[:MANY]:
        before, now = expected.get(key, ABSENT), found.get(key, ABSENT)
        is_long = LONG in (before[: len(LONG)], now[: len(LONG)])
        what = "is not what it was" if is_long else f"is {now}, and was {before}"
        yield error("config", f"{CONFIG_NAME}: {key} {what} when it was written")
    if len(changed) > MANY:
        yield error("config", f"{CONFIG_NAME}: {len(changed) - MANY} more values are not as they were written")


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
    text = json.dumps(part[key]) if key in part else ABSENT
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
