"""A vLLM endpoint, asked for what a comparison needs: tokens, log-probabilities, greedy answers, capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import httpx
import numpy as np
import numpy.typing as npt

from reap_serve.errors import EngineError
from reap_serve.records import JsonValue

TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model says of given tokens, N of them, natural logarithms.

    Attributes:
        logprob_N: Of the token that is there.
        top_ids_NK: The K tokens that the model finds likeliest, best first; -1 fills rows with fewer.
        top_logprobs_NK: Theirs; -inf fills.
    """

    logprob_N: npt.NDArray[np.float64]
    top_ids_NK: npt.NDArray[np.int64]
    top_logprobs_NK: npt.NDArray[np.float64]


class ScoringEndpoint:
    """A running endpoint; use it as a context manager.

    Args:
        url: `http://host:port`, with or without `/v1`.
        api_key: Bearer token, None for none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=600.0)
        models = self._request("GET", "/v1/models")["data"]
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise EngineError(f"{self.url}/v1/models lists no model", "give the URL of an OpenAI endpoint of vLLM")
        self.model = str(models[0]["id"])
        longest = models[0].get("max_model_len")
        self.max_model_len = longest if isinstance(longest, int) else None

    def __enter__(self) -> ScoringEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        """Tokens of a chat request; see `traffic.teacher_forcing.Renderer`."""
        messages = body["messages"]
        assert isinstance(messages, list | tuple)
        request: dict[str, JsonValue] = {
            "model": self.model,
            "messages": [*messages, *([dict(answer)] if answer is not None else [])],
            "add_generation_prompt": answer is None,
        }
        for key in ("tools", "chat_template", "chat_template_kwargs"):
            if body.get(key) is not None:
                request[key] = body[key]
        return self._tokens(request)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text; see `traffic.teacher_forcing.Renderer`."""
        return self._tokens({"model": self.model, "prompt": text, "add_special_tokens": special}) if text else []

    def score(self, token_ids: Sequence[int], first: int) -> TokenScores:
        """Scores the tokens from position `first` on, each given all before it."""
        answer = self._request(
            "POST",
            "/v1/completions",
            {
                "model": self.model,
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": TOP_LOGPROBS,
            },
        )
        rows = _first_choice(answer).get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(token_ids):
            raise EngineError(f"{self.url} returns no prompt_logprobs", "give the URL of an OpenAI endpoint of vLLM")
        return _token_scores(token_ids[first:], rows[first:])

    def generate(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy answer to a prompt, as tokens."""
        answer = self._request(
            "POST",
            "/v1/completions",
            {
                "model": self.model,
                "prompt": list(token_ids),
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "return_token_ids": True,
            },
        )
        tokens = _first_choice(answer).get("token_ids")
        return [token for token in tokens if isinstance(token, int)] if isinstance(tokens, list) else []

    def kv_cache_tokens(self) -> int | None:
        """Tokens that the engine's KV cache holds, from its /metrics; None when it does not say."""
        from prometheus_client.parser import text_string_to_metric_families

        response = self._client.get("/metrics")
        if response.status_code != 200:
            return None
        for family in text_string_to_metric_families(response.text):
            if family.name == "vllm:cache_config_info":
                for sample in family.samples:
                    if (tokens := sample.labels.get("kv_cache_size_tokens", "")).isdigit():
                        return int(tokens)
        return None

    def _tokens(self, request: Mapping[str, JsonValue]) -> list[int]:
        tokens = self._request("POST", "/tokenize", request).get("tokens")
        if not isinstance(tokens, list):
            raise EngineError(f"{self.url}/tokenize returns no tokens", "give the URL of an OpenAI endpoint of vLLM")
        return [token for token in tokens if isinstance(token, int)]

    def _request(self, method: str, path: str, body: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}{path} does not answer: {error}", "is the server running?") from None
        if response.status_code != 200:
            # The status alone: an error body may quote the request.
            raise EngineError(f"{self.url}{path} answers with HTTP {response.status_code}", "see the server's log")
        value = response.json()
        assert isinstance(value, dict)
        return value


def _first_choice(answer: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EngineError("the endpoint returned no choice", "see the server's log")
    return choices[0]


def _token_scores(token_ids: Sequence[int], rows: Sequence[JsonValue]) -> TokenScores:
    logprobs = np.full(len(rows), -np.inf)
    top_ids = np.full((len(rows), TOP_LOGPROBS), -1, np.int64)
    top_logprobs = np.full((len(rows), TOP_LOGPROBS), -np.inf)
    for position, (token, row) in enumerate(zip(token_ids, rows, strict=True)):
        assert isinstance(row, dict)
        for text, entry in row.items():
            assert isinstance(entry, dict)
            logprob, rank, token_id = entry["logprob"], entry["rank"], int(text)
            assert isinstance(logprob, int | float)
            assert isinstance(rank, int)
            if token_id == token:
                logprobs[position] = logprob
            if rank <= TOP_LOGPROBS:
                top_ids[position, rank - 1], top_logprobs[position, rank - 1] = token_id, logprob
    return TokenScores(logprobs, top_ids, top_logprobs)
