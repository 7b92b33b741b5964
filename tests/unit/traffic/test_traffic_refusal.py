"""Records that a template refuses are that record's fault: named, or counted; and no reason quotes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
from traffic_records import ASSISTANT, USER, batch, read_records

from reap_serve.errors import TrafficError
from reap_serve.records import JsonValue
from reap_serve.traffic.refusal import Refusals, RefusedRecordError, shown_reason
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import TeacherForcing

SECRET = "the launch code is 4711 and nothing else"


class Alternating:
    """A renderer of one token a character, whose template demands alternating roles."""

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        messages = body["messages"]
        assert isinstance(messages, list)
        roles = [message["role"] for message in messages]
        if any(one == other for one, other in itertools.pairwise(roles)):
            raise ValueError("Conversation roles must alternate user/assistant")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"
        return list(map(ord, text if answer is None else f"{text}{answer['content']}."))

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return list(map(ord, text))


def requests(path: Path) -> list[Request]:
    records = [batch([USER], ASSISTANT), batch([USER, USER], ASSISTANT), {"prompt": ""}, batch([USER], ASSISTANT)]
    return read_records(
        path, *records[:2], {**records[2], "url": "/v1/completions", "body": {"prompt": ""}}, records[3]
    )[0]


def test_the_first_stops_with_its_place_and_reason(tmp_path: Path) -> None:
    forcing = TeacherForcing(Alternating())
    one, two, *_ = requests(tmp_path)
    assert forcing.tokens_or_refuse(one, Refusals()) is not None
    with pytest.raises(TrafficError, match=r":2: refused by the engine: Conversation roles must") as caught:
        forcing.tokens_or_refuse(two, Refusals())
    assert caught.value.exit_code == 2
    assert "--skip-malformed" in str(caught.value)


def test_others_are_run_and_it_is_counted(tmp_path: Path) -> None:
    forcing, refusals = TeacherForcing(Alternating()), Refusals(skip=True)
    found = [forcing.tokens_or_refuse(request, refusals) for request in requests(tmp_path)]
    assert [tokens is None for tokens in found] == [False, True, True, False]
    assert refusals.malformed.counts == {
        "refused by the engine: Conversation roles must alternate user/assistant": 1,
        "refused by the engine: the prompt is empty": 1,
    }


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("Unknown part type: file"), "Unknown part type: file"),
        (ValueError(f"cannot take {SECRET}"), "ValueError, whose text quotes the request"),
        (
            RefusedRecordError(f"bad value '{SECRET[:20]}'"),
            "RefusedRecordError, whose text quotes the request",
        ),
        (ValueError("first line\nsecond line"), "first line"),
        (KeyError(), "KeyError"),
        (ValueError("\x1b[31mred"), "?[31mred"),
    ],
)
def test_a_reason_does_not_quote_the_request(error: Exception, shown: str, tmp_path: Path) -> None:
    ((request,), _) = read_records(tmp_path, batch([{"role": "user", "content": SECRET}], ASSISTANT))
    assert shown_reason(error, request) == shown
