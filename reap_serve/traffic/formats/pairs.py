"""Records that hold the body of a request and its response under two keys: logs of proxies, and of tracing tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_responses_body
from reap_serve.traffic.json_text import as_object, decoded
from reap_serve.traffic.rows import Row

# Keys of a body, and those under which its response may stand: Helicone, proxies, LangSmith and W&B Weave.
_KEYS = {"request_body": ("response_body",), "request": ("response",), "inputs": ("outputs", "output")}
# Where each says with which status the request ended.
_STATUS_KEYS = ("response_status", "status_code", "status")
SUCCESS = re.compile(r"\s*2\d\d\b")
_FAILURE = re.compile(r"\s*[013-9]\d\d\b|error$")


@dataclass(frozen=True, slots=True)
class Pair:
    """A body and its response.

    Attributes:
        body: Body of a request; None for a record that is no call of a model.
        response: Its response; None when it failed or none was recorded.
    """

    body: Object | None
    response: JsonValue


def pair_of(row: Row) -> Pair | None:
    """The body and the response in a record, None when it has no such keys or no body of a request under them.

    Either stands as it is, as JSON text, or as the body of an HTTP message with a status.

    LangSmith's runs of other types than `llm` are no calls of a model: what they hold is what a caller of the chain
    wrote and read.
    """
    if "messages" in row or "prompt" in row:
        return None
    for asked, answers in _KEYS.items():
        if asked not in row:
            continue
        if asked == "inputs" and isinstance(row.get("run_type"), str) and row["run_type"] != "llm":
            return Pair(None, None)
        body = decoded(row[asked])
        if isinstance(body, Mapping) and "body" in body:
            body = decoded(body["body"])
        if not isinstance(body, Mapping) or not ("messages" in body or "prompt" in body or is_responses_body(body)):
            return None
        response = next((row[key] for key in answers if row.get(key) is not None), None)
        statuses = [row.get(key) for key in _STATUS_KEYS]
        message = as_object(response)
        if "body" in message and not message.keys().isdisjoint(_STATUS_KEYS):
            response = message["body"]
            statuses += [message.get(key) for key in _STATUS_KEYS]
        failed = row.get("error") or any(_FAILURE.match(str(each)) for each in statuses)
        return Pair(body, None if failed else response)
    return None
