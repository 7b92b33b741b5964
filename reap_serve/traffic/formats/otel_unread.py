"""Names of attributes that hold the text of a model call in a convention that is not read.

Such a span must not pass for one of lengths only: its text was recorded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object
from reap_serve.traffic.formats.otel_values import Attributes

# Attributes by which other tools mark a model call, and their values.
_CALLS = {
    "mlflow.spanType": ("LLM", "CHAT_MODEL", '"LLM"', '"CHAT_MODEL"'),
    "traceloop.span.kind": ("llm",),
    "langsmith.span.kind": ("llm", "LLM"),
    "braintrust.span_attributes.type": ("llm",),
    "lmnr.span.type": ("LLM",),
    "span_type": ("llm", "LLM"),
}
_TEXT = re.compile(
    r"(?:^|[._])(?:prompts?|messages?|inputs?|outputs?|completions?|contents?|request_data|response_data|spanInputs"
    r"|spanOutputs|chat_ctx|all_messages_events|events|request_body|response_body|query|answer)(?:[._]|$)",
)
_NUMBERS = re.compile(r"tokens?|usage|count|cost|mime_type|type$|model|temperature|max_|\.id$|name$|finish_reason")
_SHOWN_NAMES = 4
_LONGEST_NAME = 60


def is_foreign_call(attributes: Attributes) -> bool:
    """Whether a span is a model call of a convention that is not read."""
    if "request_data" in attributes and "response_data" in attributes:
        return True
    return any(attributes.get(key) in values for key, values in _CALLS.items())


def unread_names(attributes: Attributes, events: Sequence[Object]) -> list[str]:
    """Names of the attributes, of the span or of its events, that look like text of a prompt or an answer.

    Names alone, cut and without odd characters: they come from the record.
    """
    found = [key for key, value in attributes.items() if _holds_text(key, value)]
    for event in events:
        inner = event.get("attributes")
        if isinstance(inner, Mapping):
            found += [f"{event.get('name')}/{key}" for key, value in inner.items() if _holds_text(key, value)]
    names = [re.sub(r"[^\w./-]", "?", key, flags=re.ASCII)[:_LONGEST_NAME] for key in found]
    return names[:_SHOWN_NAMES]


def _holds_text(key: str, value: JsonValue) -> bool:
    if not value or isinstance(value, (int, float)):
        return False
    return _TEXT.search(key) is not None and _NUMBERS.search(key) is None
