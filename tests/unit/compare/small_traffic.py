"""Requests for the stub endpoint."""

from __future__ import annotations

from typing import Any

from reap_serve.traffic.request import Origin, Request


def chat(question: str, answer: str | dict[str, Any] | None = None, slice: str = "default", **body: Any) -> Request:
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return Request(
        {"messages": [{"role": "user", "content": question}], **body},
        "chat",
        slice,
        Origin("stub", "requests", 1),
        answer=message,
    )


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "get_weather", "arguments": "{}"}}],
}
