"""Attributes of OpenTelemetry records: OTLP's list of typed values, or a plain object, as one mapping."""

from __future__ import annotations

from collections.abc import Mapping

from reap_serve.records import JsonValue
from reap_serve.traffic.body import is_list
from reap_serve.traffic.malformed import MalformedRecordError

Attributes = dict[str, JsonValue]

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
