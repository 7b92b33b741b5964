"""Three parts of the traffic that share no conversation: to observe, to choose, to judge."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reap_serve.errors import RequestError
from reap_serve.traffic.request import Request

# Shares of each slice's conversations.
SHARES = {"statistics": 0.5, "selection": 0.2, "held-out": 0.3}


@dataclass(frozen=True, slots=True)
class Split:
    """The parts.

    Attributes:
        parts: Requests by part, in the order of the traffic.
        conversations: Conversations by part.
    """

    parts: Mapping[str, tuple[Request, ...]]
    conversations: Mapping[str, int]


def split_traffic(requests: Sequence[Request], seed: int) -> Split:
    """Parts the traffic by conversation, alike in each slice.

    The conversations that begin in a slice are put in the order of SHA-256(seed, conversation); the first half is
    observed, the next fifth chooses, the rest judges. The same traffic and seed give the same parts, in whatever order
    the files stand. A conversation is what the trace calls one, else all requests that begin with the same messages up
    to the first of the user: turns of one conversation stay together, and so do repetitions of one question.

    Raises:
        RequestError: A slice has too few conversations.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        members[_conversation(request)].append(index)
    by_slice: defaultdict[str, list[str]] = defaultdict(list)
    for key, indices in members.items():
        by_slice[min(requests[index].slice for index in indices)].append(key)
    chosen: dict[str, list[int]] = {part: [] for part in SHARES}
    conversations = dict.fromkeys(SHARES, 0)
    for name in sorted(by_slice):
        keys = sorted(by_slice[name], key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
        first = max(1, min(round(SHARES["statistics"] * len(keys)), len(keys) - 2))
        second = max(first + 1, min(first + round(SHARES["selection"] * len(keys)), len(keys) - 1))
        for part, some in zip(SHARES, (keys[:first], keys[first:second], keys[second:]), strict=True):
            conversations[part] += len(some)
            chosen[part] += [index for key in some for index in members[key]]
    parts = {part: tuple(requests[index] for index in sorted(indices)) for part, indices in chosen.items()}
    for name in sorted({request.slice for request in requests}):
        if not all(any(request.slice == name for request in part) for part in parts.values()):
            raise RequestError(
                f"slice {name} has too few conversations: tune needs some each to observe, to choose and to judge",
                "give more traffic of it, or leave it out",
            )
    return Split(parts, conversations)


def _conversation(request: Request) -> str:
    if request.session is not None:
        return f"session:{request.session}"
    body = request.body or {}
    messages = body.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        begin = []
        for message in messages:
            begin.append(message)
            if isinstance(message, Mapping) and message.get("role") == "user":
                break
        return json.dumps(begin, sort_keys=True, default=str)
    return json.dumps(body.get("prompt"), default=str)
