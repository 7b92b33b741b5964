"""Attributes of OpenTelemetry records: OTLP's list of typed values, or a plain object, as one mapping."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import is_list
from reap_serve.traffic.malformed import MalformedRecordError

Attributes = dict[str, JsonValue]

# Names of conventions under which exporters nest.
_ROOTS = ("gen_ai", "llm", "openinference", "input", "output", "ai", "session", "traceloop")
_SCALARS = ("stringValue", "boolValue", "doubleValue", "bytesValue")


def attributes_of(value: JsonValue) -> Attributes:
    """The attributes of a span, an event or a log record.

    Args:
        value: `[{"key", "value": {"stringValue": ...}}]` (OTLP JSON,
            https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding) or `{key: value}`.

    Raises:
        MalformedRecordError: It is neither.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if not is_list(value):
        raise MalformedRecordError("attributes is neither a list nor an object")
    found: Attributes = {}
    for item in value:
        key = item.get("key") if isinstance(item, Mapping) else None
        if not isinstance(item, Mapping) or not isinstance(key, str):
            raise MalformedRecordError("attribute without a key")
        found[key] = _plain(item.get("value"))
    return found


def _plain(value: JsonValue) -> JsonValue:
    """The JSON value of an OTLP AnyValue."""
    if not isinstance(value, Mapping):
        raise MalformedRecordError("attribute without a typed value")
    for kind in _SCALARS:
        if kind in value:
            return value[kind]
    if "intValue" in value:
        return _integer(value["intValue"])
    if "arrayValue" in value:
        return [_plain(item) for item in _items(value["arrayValue"])]
    if "kvlistValue" in value:
        return attributes_of(_items(value["kvlistValue"]))
    return None


def _integer(value: JsonValue) -> JsonValue:
    # 64-bit integers are text in the JSON form of protobuf.
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise MalformedRecordError("intValue is not a whole number") from None
    return value


def _items(value: JsonValue) -> list[JsonValue]:
    values = value.get("values") if isinstance(value, Mapping) else None
    if values is None:
        return []
    if not is_list(values):
        raise MalformedRecordError("values of an attribute is not a list")
    return list(values)


def flattened(attributes: Attributes) -> Attributes:
    """The attributes with nested objects under the names of conventions spelt out: `{"llm": {"a": 1}}` as `llm.a`."""
    if not any(isinstance(attributes.get(root), Mapping) for root in _ROOTS):
        return attributes
    found = {key: value for key, value in attributes.items() if key not in _ROOTS or not isinstance(value, Mapping)}
    for root in _ROOTS:
        nested = attributes.get(root)
        if isinstance(nested, Mapping):
            _flatten(root, nested, found)
    return found


def _flatten(prefix: str, nested: Mapping[str, JsonValue], found: Attributes) -> None:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            _flatten(f"{prefix}.{key}", value, found)
        else:
            found[f"{prefix}.{key}"] = value


def numbered(attributes: Attributes, prefix: str) -> list[JsonValue]:
    """What stands under `<prefix>.<i>.*`, in the order of the numbers; lists under the prefix itself as they are.

    Raises:
        MalformedRecordError: A number is missing: what it held was dropped.
    """
    listed = attributes.get(prefix)
    if is_list(listed):
        return list(listed)
    tree: dict[str, JsonValue] = {}
    start = f"{prefix}."
    for key, value in attributes.items():
        if key.startswith(start):
            _insert(tree, key[len(start) :].split("."), value)
    items = {key: value for key, value in tree.items() if key.isascii() and key.isdigit()}
    return _in_order(items)


def _insert(tree: dict[str, JsonValue], path: list[str], value: JsonValue) -> None:
    for key in path[:-1]:
        inner = tree.get(key)
        if not isinstance(inner, dict):
            inner = {}
            tree[key] = inner
        tree = inner
    tree[path[-1]] = value


def _in_order(items: Mapping[str, JsonValue]) -> list[JsonValue]:
    numbers = sorted(int(key) for key in items)
    if numbers != list(range(len(numbers))):
        raise MalformedRecordError("numbered attributes with a gap")
    by_number = {int(key): value for key, value in items.items()}
    return [_listed(by_number[number]) for number in numbers]


def _listed(value: JsonValue) -> JsonValue:
    """The value with every object of numbers as a list."""
    if not isinstance(value, Mapping):
        return value
    if value and all(key.isascii() and key.isdigit() for key in value):
        return _in_order(value)
    return {key: _listed(item) for key, item in value.items()}
