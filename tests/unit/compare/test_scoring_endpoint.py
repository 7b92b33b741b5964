"""What is asked of an endpoint over HTTP, and what is understood of its replies."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from small_traffic import WEATHER
from stub_endpoint import END, StubEndpoint, bigram_model

from reap_serve.compare.endpoint import KvCache, ScoringEndpoint
from reap_serve.errors import EngineError, RequestError

SECRET = "kleptomaniac"


def test_scores_are_the_models_logprobs() -> None:
    model = bigram_model(1)
    with StubEndpoint(model) as stub, ScoringEndpoint(f"{stub.url}/v1/") as endpoint:
        tokens = [10, 20, 30, 40]
        scores = endpoint.score(tokens, 2)
        assert (endpoint.model, endpoint.max_model_len) == ("stub", 4096)
    assert scores.token_ids_N.tolist() == [30, 40]
    np.testing.assert_allclose(scores.logprob_N, [model[20, 30], model[30, 40]], rtol=1e-6)
    np.testing.assert_array_equal(scores.top_ids_NK, np.argsort(-model[[20, 30]], axis=1)[:, :20])
    np.testing.assert_allclose(scores.top_logprobs_NK, -np.sort(-model[[20, 30]], axis=1)[:, :20], rtol=1e-6)


def test_an_answer_has_tokens_text_and_reason() -> None:
    with (
        StubEndpoint(bigram_model(1), answer=lambda prompt: "abcdef", finish_reason="length") as stub,
        ScoringEndpoint(stub.url) as endpoint,
    ):
        answer = endpoint.generate([1, 2], 4)
        body = stub.seen[-1][1]
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([97, 98, 99, 100], "abcd", "length")
    assert body["temperature"] == 0.0


def test_chats_are_rendered_with_their_tools_and_template() -> None:
    with StubEndpoint(bigram_model(1)) as stub, ScoringEndpoint(stub.url) as endpoint:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER], "temperature": 1, "seed": 4}
        assert endpoint.render_chat(body, None) == [*map(ord, "u:hi"), END, *map(ord, "a:")]
        sent = stub.seen[-1][1]
        assert endpoint.tokenize("", special=True) == []
    assert sent["tools"] == [WEATHER]
    assert sent["add_generation_prompt"] is True
    assert "seed" not in sent


def test_tool_calls_come_from_the_endpoints_parser() -> None:
    found = [{"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}]
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER], "temperature": 1.0}
    with (
        StubEndpoint(bigram_model(1), tool_parser=True, tool_calls=found) as stub,
        ScoringEndpoint(stub.url) as endpoint,
    ):
        calls = endpoint.tool_calls(body, 32)
        sent = stub.seen[-1][1]
    assert calls is not None
    assert [(call.name, call.arguments) for call in calls] == [("get_weather", '{"city": "Ulm"}')]
    assert (sent["temperature"], sent["max_tokens"], sent["tool_choice"]) == (0.0, 32, "auto")


def test_an_endpoint_without_a_parser_is_asked_once() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER]}
    with StubEndpoint(bigram_model(1)) as stub, ScoringEndpoint(stub.url) as endpoint:
        assert endpoint.tool_calls(body, 32) is None
        assert endpoint.tool_calls(body, 32) is None
        assert [path for path, _ in stub.seen].count("/v1/chat/completions") == 1


def test_kv_cache_of_all_ranks() -> None:
    lines = [
        f'vllm:cache_config_info{{engine="{rank}",kv_cache_size_tokens="1000",kv_cache_max_concurrency="1.5"}} 1.0'
        for rank in (0, 1)
    ]
    metrics = "\n".join(["# TYPE vllm:cache_config_info gauge", *lines, ""]).encode()
    with StubEndpoint(bigram_model(1), replies={"/metrics": metrics}) as stub, ScoringEndpoint(stub.url) as endpoint:
        assert endpoint.kv_cache() == KvCache(2000, 3.0)
    with StubEndpoint(bigram_model(1), fail_paths=("/metrics",)) as stub, ScoringEndpoint(stub.url) as endpoint:
        assert endpoint.kv_cache() == KvCache(None, None)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"choices": []}, "no choice"),
        ({"choices": [{}]}, "no prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": [None]}]}, "no prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": [None, {"107": {"rank": 1}}]}]}, "not those of vLLM"),
        ({"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -1.0, "rank": 1}}]}]}, "leave out token 0 of 1"),
        ([1], "no JSON object"),
        (b"<html>", "no JSON object"),
    ],
)
def test_replies_of_another_form_are_refused(reply: object, message: str) -> None:
    with (
        StubEndpoint(bigram_model(1), replies={"/v1/completions": reply}) as stub,
        ScoringEndpoint(stub.url) as endpoint,
        pytest.raises(EngineError, match=message),
    ):
        endpoint.score([107, 107], 1)


def test_errors_quote_no_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    failing = ("/v1/completions", "/tokenize")
    with StubEndpoint(bigram_model(1), fail_paths=failing) as stub, ScoringEndpoint(stub.url) as endpoint:
        with pytest.raises(EngineError, match="HTTP 500") as caught:
            endpoint.score([ord(character) for character in SECRET], 1)
        with pytest.raises(EngineError, match="HTTP 500") as rendered:
            endpoint.render_chat({"messages": [{"role": "user", "content": SECRET}]}, None)
    assert SECRET not in str(rendered.value) + caplog.text
    assert str([ord(character) for character in SECRET])[1:-1] not in str(caught.value) + caplog.text


def test_nobody_listens() -> None:
    with StubEndpoint(bigram_model(1)) as stub:
        url = stub.url
    with pytest.raises(EngineError, match="does not answer"):
        ScoringEndpoint(url)
    with pytest.raises(RequestError, match="no URL"):
        ScoringEndpoint("http://host:port")


def test_an_endpoint_without_models_is_refused() -> None:
    stub = StubEndpoint(bigram_model(1), replies={"/v1/models": {"data": []}})
    with stub, pytest.raises(EngineError, match="lists no model"):
        ScoringEndpoint(stub.url)
