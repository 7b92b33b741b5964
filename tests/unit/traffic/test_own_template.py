"""Requests that bring a chat template: refused, or run where they harm nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reap_serve.cli.app import _register, app
from reap_serve.errors import ReapServeError, TrafficError
from reap_serve.records import JsonValue
from reap_serve.traffic.malformed import Malformed, MalformedRecordError
from reap_serve.traffic.own_template import TemplateSandbox, special_tokens_of
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.request import Origin, Request

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES: list[JsonValue] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def request(template: JsonValue, **body: JsonValue) -> Request:
    content: dict[str, JsonValue] = {"messages": MESSAGES, "chat_template": template, "max_tokens": 5, **body}
    return Request(content, "chat", "code", Origin("f", "requests", 1), {"role": "assistant", "content": "yes"})


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    with TemplateSandbox({"bos_token": "<s>"}, max_seconds=2.0) as made:
        yield made


def test_a_template_becomes_the_text_that_it_renders(sandbox: TemplateSandbox) -> None:
    settled = sandbox.settle(request(TEMPLATE))
    assert settled.kind == "completion"
    assert settled.body == {"max_tokens": 5, "prompt": "<s><user>hi</s>\n<assistant>", "add_special_tokens": False}
    assert settled.answer == {"text": "yes"}
    assert settled.slice == "code"
    within = sandbox.settle(request(None, chat_template_kwargs={"chat_template": "{{ thinking }}", "thinking": "on"}))
    assert within.body is not None
    assert within.body["prompt"] == "on"
    plain = Request({"messages": MESSAGES}, "chat", "code", Origin("f", "requests", 1))
    assert sandbox.settle(plain) is plain


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too much"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{{ 'a' * 10**7 }}", "length"),
        ("{{ 9 ** (9 ** 9) }}", "takes too much"),
        ("{{ messages[0].__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('secret') }}", "fails"),
        ("{% unknown %}", "TemplateSyntaxError"),
        ("{{ " + "(" * 5000 + " }}", "fails"),
        (3, "not text"),
    ],
)
def test_what_fails_is_the_records_fault(sandbox: TemplateSandbox, template: JsonValue, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(MalformedRecordError, match=message) as caught:
        sandbox.settle(request(template))
    assert time.monotonic() - started < 15
    assert "secret" not in str(caught.value)
    # The next one is served.
    assert sandbox.settle(request("{{ messages | length }}")).body is not None


LINES = [
    {"messages": MESSAGES},
    {"messages": MESSAGES, "chat_template": TEMPLATE},
    {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": TEMPLATE}},
    {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}, "chat_template": None},
]


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_it_is_refused_by_default(traffic: Path, tmp_path: Path) -> None:
    with pytest.raises(TrafficError, match=r":2: chat template of its own, which --trust-request-chat-template allows"):
        list(read_traffic([str(traffic)]))
    malformed = Malformed()
    assert len(list(read_traffic([str(traffic)], skip_malformed=True, malformed=malformed))) == 2
    assert malformed.total == 2
    with TemplateSandbox() as sandbox:
        read = list(read_traffic([str(traffic)], settle_template=sandbox.settle))
    assert [each.kind for each in read] == ["chat", "completion", "completion", "chat"]


@pytest.mark.parametrize(
    "words",
    [
        ("traffic", "show", "{traffic}"),
        ("traffic", "sample", "{traffic}", "--tokens", "9", "--output", "{out}"),
        ("traffic", "convert", "{traffic}", "--output", "{out}"),
        ("compare", "http://a", "http://b", "{traffic}", "--output", "{out}"),
    ],
)
def test_every_command_refuses_it(traffic: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    _register()
    out = tmp_path / "out"
    given = [word.format(traffic=traffic, out=out) for word in words]
    result = CliRunner().invoke(app, given)
    assert isinstance(result.exception, ReapServeError), result.output
    assert result.exception.exit_code == 2
    assert "--trust-request-chat-template" in str(result.exception)
    assert not out.exists()
    if words[0] == "traffic":
        assert CliRunner().invoke(app, [*given, "--trust-request-chat-template"]).exit_code == 0


def test_a_trusted_template_is_converted_as_it_is(traffic: Path, tmp_path: Path) -> None:
    _register()
    out = tmp_path / "out"
    words = ["traffic", "convert", str(traffic), "--output", str(out), "--trust-request-chat-template"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert json.loads(out.read_text().splitlines()[1])["body"]["chat_template"] == TEMPLATE


def test_special_tokens_of_a_model(tmp_path: Path) -> None:
    assert special_tokens_of(tmp_path) == {}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None, "x": "y"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_tokens_of(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert special_tokens_of(tmp_path) == {}
