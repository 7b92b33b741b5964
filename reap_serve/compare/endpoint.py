"""A vLLM endpoint, asked for what a comparison needs: tokens, log-probabilities, greedy answers, capacity."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import httpx

from reap_serve.compare.answers import Answer
from reap_serve.compare.scores import TOP_LOGPROBS, TokenScores, token_scores
from reap_serve.compare.validity import ToolCall, calls_in_message
from reap_serve.errors import EngineError, RequestError
from reap_serve.plan.record import Plan
from reap_serve.records import JsonValue
from reap_serve.serve.live_status import PlanPhase
from reap_serve.traffic.refusal import RefusedRecordError

# What an endpoint answers to a request that it will not take, whatever its state.
_REFUSED = (400, 413, 422)
_NOT_VLLM = "give the URL of an OpenAI endpoint of vLLM"


@dataclass(frozen=True, slots=True)
class KvCache:
    """What an engine's KV cache holds.

    Attributes:
        tokens: Tokens of all sequences together; None when the engine does not say.
        sequences: Sequences of the longest length at once; None likewise.
    """

    tokens: int | None
    sequences: float | None


class ScoringEndpoint:
    """A running endpoint; use it as a context manager. Its methods may be called from several threads.

    No error carries text of a request or an answer, but for `RefusedRecordError`, whose reason is looked through before
    it is shown.

    Args:
        url: `http://host:port`, with or without `/v1`.
        api_key: Bearer token, None for none.

    Raises:
        EngineError: It does not answer, or lists no model.
        RequestError: `url` is no URL.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=600.0)
        except httpx.InvalidURL as error:
            raise RequestError(f"{url} is no URL: {error}", "give http://host:port") from None
        self._parses_tool_calls = True
        models = self._request("GET", "/v1/models").get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise EngineError(f"{self.url}/v1/models lists no model", _NOT_VLLM)
        self.model = str(models[0].get("id"))
        longest = models[0].get("max_model_len")
        self.max_model_len = longest if isinstance(longest, int) else None
        self._arguments: dict[str, dict[str, JsonValue]] = {}

    def __enter__(self) -> ScoringEndpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def under(self, plan: str) -> ScoringEndpoint:
        """The same endpoint, asked under one of its plans; it shares the connections of this one."""
        masked = copy.copy(self)
        masked._arguments = {"vllm_xargs": {"reap_plan": plan}}
        return masked

    def load_plan(self, name: str, plan: Plan, phase: PlanPhase = "all") -> None:
        """Gives an endpoint of `reap-serve serve` a plan, which no request is under that does not ask for it.

        Raises:
            EngineError: The endpoint takes no plans, or not this one.
        """
        body: dict[str, JsonValue] = {
            "name": name,
            "plan": plan.model_dump(mode="json"),
            "activate": False,
            **({} if phase == "all" else {"phase": phase}),
        }
        response = self._send("PUT", "/v1/reap/mask", body)
        if response.status_code == 404:
            raise EngineError(f"{self.url} takes no plans", "start it by `reap-serve serve`")
        if response.status_code != 200:
            # No text of the traffic is in this request: its error may be shown.
            raise EngineError(f"{self.url} refuses the plan {name}: {_message(response)}", "make the plan again")

    def forget_plan(self, name: str) -> None:
        """Takes a plan's name away."""
        self._send("DELETE", f"/v1/reap/mask/{name}", None)

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

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._request("POST", "/detokenize", {"model": self.model, "tokens": list(token_ids)}).get("prompt"))

    def score(self, token_ids: Sequence[int], first: int, prompt_tokens: int | None = None) -> TokenScores:
        """Scores the tokens from position `first` on, each given all before it.

        Args:
            token_ids: What is scored, in one pass as if all of it were a prompt.
            first: Position of the first token to score, 1 at least.
            prompt_tokens: Where the recorded answer begins: a plan that only writes answers routes the tokens from
                there on. None where all is a prompt.
        """
        arguments = self._arguments
        if prompt_tokens is not None and arguments:
            arguments = {"vllm_xargs": {**arguments["vllm_xargs"], "reap_prompt_tokens": prompt_tokens}}
        answer = self._request(
            "POST",
            "/v1/completions",
            {
                "model": self.model,
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": TOP_LOGPROBS,
                **arguments,
            },
        )
        rows = self._first_choice(answer).get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(token_ids):
            raise EngineError(f"{self.url} returns no prompt_logprobs", _NOT_VLLM)
        return token_scores(token_ids[first:], rows[first:])

    def require_taken(self, token_ids: Sequence[int]) -> None:
        """Asks for one token after a prompt, to see whether the endpoint takes it.

        Raises:
            RefusedRecordError: It does not.
        """
        body: dict[str, JsonValue] = {"model": self.model, "prompt": list(token_ids), "max_tokens": 1}
        response = self._send("POST", "/v1/completions", body)
        if response.status_code in _REFUSED:
            raise RefusedRecordError(_message(response))
        self._document(response, "/v1/completions")

    def generate(self, token_ids: Sequence[int], max_tokens: int, repetition_detection: JsonValue = None) -> Answer:
        """The greedy answer to a prompt, under no grammar: `response_format` and `tool_choice` are not enforced.

        Args:
            token_ids: The prompt.
            max_tokens: Longest answer.
            repetition_detection: vLLM's parameter of this name as the recorded request has it, which then ends loops
                with the finish reason `repetition`; None for none.
        """
        detection = {} if repetition_detection is None else {"repetition_detection": repetition_detection}
        choice = self._first_choice(
            self._request(
                "POST",
                "/v1/completions",
                {
                    "model": self.model,
                    "prompt": list(token_ids),
                    "max_tokens": max_tokens,
                    "temperature": 0.0,
                    "return_token_ids": True,
                    **detection,
                    **self._arguments,
                },
            )
        )
        tokens, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(tokens, list):
            raise EngineError(f"{self.url} returns no token ids", _NOT_VLLM)
        return Answer(
            [token for token in tokens if isinstance(token, int)],
            str(choice.get("text") or ""),
            reason if isinstance(reason, str) else None,
        )

    def tool_calls(self, body: Mapping[str, JsonValue], max_tokens: int) -> tuple[ToolCall, ...] | None:
        """The tool calls of the greedy answer to a chat request, as the endpoint's own parser finds them.

        Returns:
            None when the endpoint refuses the request, as vLLM does without `--enable-auto-tool-choice`.
        """
        if not self._parses_tool_calls:
            return None
        kept = ("messages", "tools", "chat_template", "chat_template_kwargs", "parallel_tool_calls")
        request = {key: body[key] for key in kept if body.get(key) is not None}
        request |= {"model": self.model, "max_tokens": max_tokens, "temperature": 0.0, "tool_choice": "auto"}
        request |= self._arguments
        response = self._send("POST", "/v1/chat/completions", request)
        if response.status_code == 400:
            self._parses_tool_calls = False
            return None
        message = self._first_choice(self._document(response, "/v1/chat/completions")).get("message")
        return tuple(calls_in_message(message)) if isinstance(message, Mapping) else ()

    def kv_cache(self) -> KvCache:
        """What the engine's KV cache holds, from its /metrics, over all data-parallel ranks."""
        from prometheus_client.parser import text_string_to_metric_families

        response = self._send("GET", "/metrics", None)
        if response.status_code != 200:
            return KvCache(None, None)
        ranks = [
            sample.labels
            for family in text_string_to_metric_families(response.text)
            if family.name == "vllm:cache_config_info"
            for sample in family.samples
        ]
        tokens = [_number(labels.get("kv_cache_size_tokens")) for labels in ranks]
        sequences = [_number(labels.get("kv_cache_max_concurrency")) for labels in ranks]
        known_tokens, known_sequences = _total(tokens), _total(sequences)
        return KvCache(None if known_tokens is None else int(known_tokens), known_sequences)

    def _tokens(self, request: Mapping[str, JsonValue]) -> list[int]:
        response = self._send("POST", "/tokenize", request)
        if response.status_code in _REFUSED:
            raise RefusedRecordError(_message(response))
        tokens = self._document(response, "/tokenize").get("tokens")
        if not isinstance(tokens, list):
            raise EngineError(f"{self.url}/tokenize returns no tokens", _NOT_VLLM)
        return [token for token in tokens if isinstance(token, int)]

    def _first_choice(self, answer: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EngineError(f"{self.url} returned no choice", "see the server's log")
        return choices[0]

    def _request(self, method: str, path: str, body: Mapping[str, JsonValue] | None = None) -> dict[str, JsonValue]:
        return self._document(self._send(method, path, body), path)

    def _send(self, method: str, path: str, body: Mapping[str, JsonValue] | None) -> httpx.Response:
        try:
            return self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineError(
                f"{self.url}{path} does not answer: {type(error).__name__}", "is the server running?"
            ) from None

    def _document(self, response: httpx.Response, path: str) -> dict[str, JsonValue]:
        if response.status_code != 200:
            # The status alone: an error body may quote the request.
            raise EngineError(f"{self.url}{path} answers with HTTP {response.status_code}", "see the server's log")
        try:
            value = response.json()
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise EngineError(f"{self.url}{path} answers with no JSON object", _NOT_VLLM)
        return value


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
