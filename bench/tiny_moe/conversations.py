"""Conversations: how a training example is rendered and how a line of traffic is written.

Both go through the chat template that ships with the model, so a served request equals a training example.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.sandbox

from bench.tiny_moe.arithmetic import Sum
from bench.tiny_moe.tool_calls import Call

DOMAINS = ("code", "prose", "german", "tools", "arithmetic")
MODEL_NAME = "tiny-moe"
TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


_TEMPLATE = _template()


@dataclass(frozen=True, slots=True)
class Conversation:
    """One question and its recorded answer.

    Attributes:
        domain: One of ``DOMAINS``.
        question: The user's words.
        answer: The assistant's words; ``None`` if the answer is a tool call.
        tools: Schemas listed in the request.
        call: Name and arguments of the tool call; ``None`` if the answer is text.
    """

    domain: str
    question: str
    answer: str | None
    tools: Sequence[Mapping[str, object]] = ()
    call: tuple[str, Mapping[str, object]] | None = None

    @classmethod
    def from_sum(cls, question: Sum) -> "Conversation":
        """Gives the conversation of an arithmetic question."""
        return cls(domain="arithmetic", question=question.question, answer=question.answer)

    @classmethod
    def from_call(cls, call: Call) -> "Conversation":
        """Gives the conversation of a request for a tool."""
        return cls("tools", call.question, None, call.tools, (call.name, call.arguments))

    def prompt(self) -> str:
        """Renders the request up to the place where the model answers."""
        messages = [{"role": "user", "content": self.question}]
        return _TEMPLATE.render(messages=messages, tools=list(self.tools), add_generation_prompt=True)

    def text(self) -> str:
        """Renders the request with its answer."""
        answer: dict[str, object] = {"role": "assistant", "content": self.answer}
        if self.call is not None:
            name, arguments = self.call
            answer["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": dict(arguments)}}]
        messages = [{"role": "user", "content": self.question}, answer]
        return _TEMPLATE.render(messages=messages, tools=list(self.tools), add_generation_prompt=False)

    def batch_line(self, custom_id: str, max_tokens: int) -> str:
        """Writes the conversation as one line of an OpenAI Batch file with its recorded response."""
        body: dict[str, object] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": self.question}]}
        if self.tools:
            body["tools"] = list(self.tools)
        body |= {"max_tokens": max_tokens, "temperature": 0, "metadata": {"reap_slice": self.domain}}
        message: dict[str, object] = {"role": "assistant", "content": self.answer}
        finish_reason = "stop"
        if self.call is not None:
            name, arguments = self.call
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            message["tool_calls"] = [{"id": f"call-{custom_id}", "type": "function", "function": function}]
            finish_reason = "tool_calls"
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        response = {"status_code": 200, "body": {"choices": [choice]}}
        request = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return _compact(request | {"response": response})

    @classmethod
    def from_batch_line(cls, line: str) -> "Conversation":
        """Reads what ``batch_line`` wrote."""
        record = json.loads(line)
        body, message = record["body"], record["response"]["body"]["choices"][0]["message"]
        call = None
        if message.get("tool_calls"):
            function = message["tool_calls"][0]["function"]
            call = (function["name"], json.loads(function["arguments"]))
        question, domain = body["messages"][0]["content"], body["metadata"]["reap_slice"]
        return cls(domain, question, message["content"], body.get("tools", ()), call)
