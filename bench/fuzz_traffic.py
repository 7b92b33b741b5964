"""Records of every format of traffic that is read line by line, for the fuzzer to damage."""

from __future__ import annotations

import json
from typing import Any


def traffic_lines() -> list[list[Any]]:
    """A few records of every format that is read line by line."""
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi", "tool_calls": []}]
    body = {"model": "m", "messages": messages, "metadata": {"reap_slice": "code", "reap_timestamp": "1.5"}}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    response = {"choices": [{"index": 0, "message": messages[1], "finish_reason": "length"}], "usage": usage}
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    parts = [{"role": "user", "parts": [{"type": "text", "content": "hello"}]}]
    return [
        [batch | {"response": {"status_code": 200, "body": response}}, batch],
        [body, {"prompt": "once", "max_tokens": 4}, {"prompt": [1, 2, 3]}, {**body, "tools": [{"type": "function"}]}],
        [{"id": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        [
            {
                "call_type": "acompletion",
                "messages": messages,
                "response": response,
                "model_parameters": {"temperature": 0.5},
                "metadata": {"requester_metadata": {"reap_slice": "code"}},
                "startTime": 1700000000.5,
            }
        ],
        [
            {
                "id": "o",
                "trace_id": "t",
                "type": "GENERATION",
                "input": json.dumps(messages),
                "output": {"role": "assistant", "content": "x"},
                "start_time": "2026-01-01T00:00:00Z",
                "usage_details": {"input": 3, "output": 2},
                "metadata": json.dumps({"reap_slice": "code"}),
            }
        ],
        [
            {
                "name": "chat",
                "spanId": "1",
                "startTimeUnixNano": "1700000000000000000",
                "attributes": [
                    {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
                    {"key": "gen_ai.input.messages", "value": {"stringValue": json.dumps(parts)}},
                    {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "3"}},
                ],
            }
        ],
        [{"timestamp": 1, "input_length": 6, "output_length": 4, "hash_ids": [1, 2]}],
    ]
