"""The slice that a body names in its metadata, in vLLM's own request classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from reap_serve.adapter.metadata_slice import read_slices_of_metadata

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def slices_are_read() -> Iterator[None]:
    """vLLM's classes as a server changes them, for the time of a test."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    classes: list[Any] = [ChatCompletionRequest, CompletionRequest, ResponsesRequest]
    plain = [each.to_sampling_params for each in classes]
    read_slices_of_metadata()
    yield
    for each, method in zip(classes, plain, strict=True):
        each.to_sampling_params = method


def extra_args(body: dict[str, Any], kind: str = "chat") -> dict[str, Any] | None:
    """What the engine is told of a body."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    made: Any
    if kind == "chat":
        made = ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES, **body})
    elif kind == "completion":
        made = CompletionRequest.model_validate({"model": "m", "prompt": "hello", **body})
    else:
        made = ResponsesRequest.model_validate({"model": "m", "input": "hello", **body})
    arguments = made.to_sampling_params(8, {}).extra_args
    assert arguments is None or isinstance(arguments, dict)
    return arguments


@pytest.mark.parametrize("kind", ["chat", "completion", "responses"])
def test_a_slice_of_the_metadata_reaches_the_engine(kind: str) -> None:
    assert extra_args({"metadata": {"reap_slice": "code", "team": "x"}}, kind) == {"reap_slice": "code"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {}),
        ({"metadata": None}, {}),
        ({"metadata": {"team": "x"}}, {}),
        ({"metadata": "code"}, {}),
        ({"vllm_xargs": {"reap_slice": "prose"}}, {"reap_slice": "prose"}),
        ({"vllm_xargs": {"a": 1}, "metadata": {"reap_slice": "code"}}, {"a": 1, "reap_slice": "code"}),
        ({"vllm_xargs": {"reap_slice": "prose"}, "metadata": {"reap_slice": "code"}}, {"reap_slice": "code"}),
    ],
)
def test_metadata_wins_and_the_rest_stays(body: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (extra_args(body) or {}) == expected


@pytest.mark.parametrize("name", [3, "", "x" * 65, "a\x1bb", ["code"], {"a": 1}])
def test_a_name_that_breaks_the_rule_is_refused_by_its_field(name: object) -> None:
    from vllm.exceptions import VLLMValidationError

    for kind in ("chat", "completion", "responses"):
        # vLLM's own check of the body may come first: the Responses API takes text alone.
        with pytest.raises((VLLMValidationError, ValueError)) as caught:
            extra_args({"metadata": {"reap_slice": name}}, kind)
        if isinstance(caught.value, VLLMValidationError):
            assert caught.value.parameter == "metadata.reap_slice"
            assert "metadata.reap_slice is not 1 to 64 printable characters" in str(caught.value)


def test_the_methods_are_wrapped_once() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    once = ChatCompletionRequest.to_sampling_params
    read_slices_of_metadata()
    assert ChatCompletionRequest.to_sampling_params is once
