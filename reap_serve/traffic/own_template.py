"""Requests that bring a chat template of their own: code of a stranger.

They are refused, as vLLM refuses them without `--trust-request-chat-template`. Where the user trusts them, a template
runs in a process of its own, with bounded time and memory, and gives a text: what comes after sees a completion of that
text and runs nothing. A template that fails is a malformed record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Request

TRUST_OPTION = "--trust-request-chat-template"
MAX_SECONDS = 5.0
MAX_MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 22

SettleTemplate = Callable[[Request], Request]


def brings_template(body: Object | None) -> bool:
    """Whether a body holds a chat template, in either of the places where vLLM looks for one."""
    if body is None:
        return False
    arguments = body.get("chat_template_kwargs")
    inner = arguments.get("chat_template") if isinstance(arguments, Mapping) else None
    return body.get("chat_template") is not None or inner is not None


def refuse_own_template(request: Request) -> Request:
    """The request, when it brings no template.

    Raises:
        MalformedRecordError: It brings one.
    """
    if brings_template(request.body):
        raise MalformedRecordError(f"chat template of its own, which {TRUST_OPTION} allows")
    return request


def keep_own_template(request: Request) -> Request:
    """The request as it is: for what hands requests on and renders none."""
    return request


class TemplateSandbox:
    """Runs templates of requests, one after the other, in a child process; started when the first one comes.

    Args:
        special_tokens: Variables of the template, such as `bos_token`.
        max_seconds: Longest time for one template.
    """

    def __init__(self, special_tokens: Mapping[str, str] | None = None, max_seconds: float = MAX_SECONDS) -> None:
        self._special_tokens = dict(special_tokens or {})
        self._max_seconds = max_seconds
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TemplateSandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def settle(self, request: Request) -> Request:
        """A request that brings a template as a completion of the text that it renders; others as they are.

        Raises:
            MalformedRecordError: The template fails, or takes too long or too much.
        """
        body = request.body
        if body is None or not brings_template(body):
            return request
        if request.kind != "chat":
            kept = {key: value for key, value in body.items() if not key.startswith("chat_template")}
            return dataclasses.replace(request, body=kept)
        prompt = self._render(body, None)
        answer = None
        if request.answer is not None:
            answer = {"text": _answer_text(self._render(body, request.answer), prompt, request.answer)}
        kept = {key: value for key, value in body.items() if key in _KEPT}
        # The template writes the special tokens itself.
        kept |= {"prompt": prompt, "add_special_tokens": False}
        return dataclasses.replace(request, body=kept, kind="completion", answer=answer)

    def _render(self, body: Object, answer: Object | None) -> str:
        given = body.get("chat_template_kwargs")
        arguments = dict(given) if isinstance(given, Mapping) else {}
        inner = arguments.pop("chat_template", None)
        template = body.get("chat_template") if body.get("chat_template") is not None else inner
        if not isinstance(template, str):
            raise MalformedRecordError("chat template is not text")
        messages = body.get("messages")
        turns = [*messages, *([] if answer is None else [answer])] if is_list(messages) else []
        call = {
            "template": template,
            "variables": {
                **self._special_tokens,
                "documents": body.get("documents"),
                **arguments,
                "messages": [_message(turn) for turn in turns],
                "tools": body.get("tools"),
                "add_generation_prompt": answer is None,
            },
        }
        reply = self._ask(json.dumps(call).encode() + b"\n")
        text = reply.get("text")
        if not isinstance(text, str):
            raise MalformedRecordError("its chat template fails", str(reply.get("error")))
        return text

    def _ask(self, call: bytes) -> Mapping[str, JsonValue]:
        child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        # The only bound on time that also holds where the template blocks in C.
        overdue = threading.Timer(self._max_seconds, child.kill)
        overdue.start()
        try:
            child.stdin.write(call)
            child.stdin.flush()
            line = child.stdout.readline()
            reply = json.loads(line)
        except (OSError, ValueError):
            self._stop()
            reason = f"more than {self._max_seconds:g} s or {MAX_MEMORY_BYTES >> 20} MiB"
            raise MalformedRecordError("its chat template takes too much", reason) from None
        finally:
            overdue.cancel()
        return reply if isinstance(reply, dict) else {}

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            script = Path(__file__).with_name("template_child.py")
            # Nothing of this process's environment is a template's business.
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(script), str(MAX_MEMORY_BYTES), str(MAX_CHARACTERS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},
            )
            assert self._child.stdout is not None
            self._child.stdout.readline()
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            for pipe in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            child.wait()


# Fields of a chat request that mean the same for a completion.
_KEPT = frozenset({"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "repetition_detection"})


def _message(turn: JsonValue) -> JsonValue:
    """A message as templates expect it: its text in one piece, the arguments of its calls as objects."""
    if not isinstance(turn, Mapping):
        return turn
    message = dict(turn)
    content = message.get("content")
    if is_list(content):
        texts = [
            part if isinstance(part, str) else part.get("text") for part in content if isinstance(part, str | dict)
        ]
        if all(isinstance(text, str) for text in texts):
            message["content"] = "\n".join(map(str, texts))
    calls = message.get("tool_calls")
    if is_list(calls):
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: JsonValue) -> JsonValue:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def _answer_text(whole: str, prompt: str, answer: Object) -> str:
    """What of the rendered chat is the answer: what follows the prompt, without what the template writes behind it."""
    content = answer.get("content")
    text = content if isinstance(content, str) else ""
    if not whole.startswith(prompt):
        return text
    rest = whole[len(prompt) :]
    end = rest.rfind(text)
    return rest if not text or end < 0 or answer.get("tool_calls") else rest[: end + len(text)]


def special_tokens_of(model: Path) -> dict[str, str]:
    """The special tokens that a model's templates may name, from its tokenizer_config.json; none where it has none."""
    try:
        config = json.loads((model / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    found = {}
    for name, value in config.items() if isinstance(config, dict) else ():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
