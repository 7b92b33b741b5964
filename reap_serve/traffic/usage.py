"""Token counts of a response, in the forms in which APIs and logs write them."""

from __future__ import annotations

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object
from reap_serve.traffic.fields import count

# Anthropic's `input_tokens` leave out what stood in its cache.
_CACHED = ("cache_read_input_tokens", "cache_creation_input_tokens")


def usage_tokens(usage: Object | None) -> tuple[int | None, int | None]:
    """Tokens of the prompt and of the answers; None where they are not said.

    Raises:
        MalformedRecordError: A count is none.
    """
    if usage is None:
        return None, None
    prompt = count(_first(usage, "prompt_tokens", "promptTokens"))
    if prompt is None:
        prompt = count(_first(usage, "input_tokens", "inputTokens"))
        if prompt is not None:
            prompt += sum(count(usage.get(key)) or 0 for key in _CACHED)
    return prompt, count(_first(usage, "completion_tokens", "output_tokens", "completionTokens", "outputTokens"))


def usage_of_details(details: Object) -> tuple[int | None, int | None]:
    """Langfuse's `usage_details`, which state cached and reasoning tokens apart: `input`, `input_cached_tokens`, ...

    Raises:
        MalformedRecordError: A count is none.
    """
    prompt, output = usage_tokens(details)
    if prompt is None:
        prompt = _sum(details, "input")
    if output is None:
        output = _sum(details, "output")
    return prompt, output


def _sum(details: Object, prefix: str) -> int | None:
    named = [count(value) for key, value in details.items() if key == prefix or key.startswith(f"{prefix}_")]
    known = [value for value in named if value is not None]
    return sum(known) if known else None


def _first(usage: Object, *keys: str) -> JsonValue:
    return next((usage[key] for key in keys if usage.get(key) not in (None, "")), None)
