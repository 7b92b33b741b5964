"""One OpenAI endpoint: which model it serves, and how long one request takes there."""

from __future__ import annotations

import importlib
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Self
from urllib.parse import urlsplit

from pydantic_core import from_json

from reap_serve.errors import EngineError, RequestError
from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, is_list
from reap_serve.traffic.filler import filler_body
from reap_serve.traffic.latency import Outcome
from reap_serve.traffic.request import Request

# An endpoint that does not accept a connection or name its models for so long is not there.
_CONNECT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a replay calls an endpoint.

    Attributes:
        url: `http://host:port` with or without `/v1`.
        api_key: Sent as bearer token. None sends `none`, since the openai client insists on a token; vLLM without
            `--api-key` does not look at it.
        model: Name of the model; None keeps the recorded one if the endpoint serves it, else takes its only one.
        timeout_seconds: Longest wait for an answer to begin or to go on.
        max_retries: Repetitions of a request that failed. 0, so that failures are seen.
        tag_slices: Send each request's slice as `vllm_xargs.reap_slice`.
        max_output_tokens: Longest answer; None leaves what was recorded.
    """

    url: str
    api_key: str | None = None
    model: str | None = None
    timeout_seconds: float = 600.0
    max_retries: int = 0
    tag_slices: bool = False
    max_output_tokens: int | None = None


def require_url(url: str) -> None:
    """Refuses what is no URL of an endpoint.

    Raises:
        RequestError: It is none.
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise RequestError(f"{url} is no URL of an endpoint", "give http://host:port")


class Endpoint:
    """An open connection to an OpenAI endpoint; use it as an async context manager.

    Args:
        settings: How to call it.

    Raises:
        RequestError: The openai package is not installed.
    """

    def __init__(self, settings: ClientSettings) -> None:
        try:
            import openai
        except ImportError:
            raise RequestError("replay needs the openai package", "pip install 'reap-serve[traffic]'") from None
        http = _http_library()
        url = settings.url.rstrip("/")
        self._settings = settings
        self._models: tuple[str, ...] = ()
        self._client = openai.AsyncOpenAI(
            base_url=url if url.endswith("/v1") else f"{url}/v1",
            api_key=settings.api_key or "none",
            max_retries=settings.max_retries,
            timeout=http.Timeout(settings.timeout_seconds, connect=min(_CONNECT_SECONDS, settings.timeout_seconds)),
            # Without limits: a request that waits for a free connection would start late.
            http_client=openai.DefaultAsyncHttpxClient(
                limits=http.Limits(max_connections=None, max_keepalive_connections=None)
            ),
        )

    async def __aenter__(self) -> Self:
        """Asks the endpoint for its models.

        Raises:
            EngineError: It does not answer.
        """
        import openai

        try:
            self._models = tuple([model.id async for model in self._client.models.list(timeout=_CONNECT_SECONDS)])
        except openai.OpenAIError as error:
            await self._client.close()
            raise EngineError(
                f"{self._settings.url} does not answer as an OpenAI endpoint: {error}", "check the URL and the API key"
            ) from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        await self._client.close()

    def body(self, request: Request) -> dict[str, JsonValue]:
        """What is sent for a request: the recorded body, streamed, with usage.

        Raises:
            RequestError: The model is not given, not served under its recorded name, and not the only one.
        """
        settings = self._settings
        body = filler_body(request) if request.body is None else {**request.body}
        body |= {"stream": True, "stream_options": {"include_usage": True}, "model": self._model(body.get("model"))}
        if settings.max_output_tokens is not None:
            key = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
            recorded = body.get(key)
            wanted = settings.max_output_tokens
            body[key] = min(recorded, wanted) if isinstance(recorded, int) else wanted
        if settings.tag_slices:
            given = body.get("vllm_xargs")
            body["vllm_xargs"] = {**(given if isinstance(given, Mapping) else {}), "reap_slice": request.slice}
        return body

    def _model(self, recorded: JsonValue) -> str:
        if self._settings.model is not None:
            return self._settings.model
        if isinstance(recorded, str) and recorded in self._models:
            return recorded
        if len(self._models) == 1:
            return self._models[0]
        raise RequestError(
            f"{self._settings.url} serves {len(self._models)} models ({', '.join(self._models[:8])}), "
            "and the traffic names none of them",
            "give --model",
        )

    async def send(self, request: Request, scheduled: float | None, zero: float) -> Outcome:
        """Sends a request and reads its whole answer.

        Args:
            request: What to send.
            scheduled: When it should have started, for the outcome; None when now.
            zero: Start of the replay, on `time.perf_counter`.
        """
        import openai

        body = self.body(request)
        answer = _StreamedAnswer(zero)
        started = time.perf_counter() - zero
        failure = None
        try:
            await self._stream(body, answer)
            failure = answer.failure()
        except openai.APIStatusError as error:
            failure = f"HTTP {error.status_code}"
        except (openai.OpenAIError, _http_library().HTTPError) as error:
            failure = type(error).__name__
        return Outcome(
            scheduled=started if scheduled is None else scheduled,
            started=started,
            token_times=answer.token_times,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=len(answer.token_times) if answer.output_tokens is None else answer.output_tokens,
            failure=failure,
        )

    async def _stream(self, body: Object, answer: _StreamedAnswer) -> None:
        # The body goes as `extra_body`, which replaces the typed arguments: sent as recorded, not validated again.
        if "messages" in body:
            chats = self._client.chat.completions.with_streaming_response
            async with chats.create(model="", messages=[], stream=True, extra_body=body) as response:
                async for line in response.iter_lines():
                    answer.read(line)
        else:
            completions = self._client.completions.with_streaming_response
            async with completions.create(model="", prompt="", stream=True, extra_body=body) as response:
                async for line in response.iter_lines():
                    answer.read(line)


def _http_library() -> ModuleType:
    """The HTTP library under the openai package: httpx2 from its release 3 on, httpx before."""
    import openai

    # The names that openai exports claim to be its own; the class below one of them tells the truth.
    client = openai.DefaultAsyncHttpxClient.__mro__[1]
    return importlib.import_module(client.__module__.partition(".")[0])


class _StreamedAnswer:
    """Arrival times in a stream of server-sent events; the events' text is not kept.

    Lines are parsed here and not by the openai package: building its chunk models takes longer than the distance of
    two tokens at the rates at which a replay runs, and would be measured as latency.
    """

    def __init__(self, zero: float) -> None:
        self.token_times = array("d")
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self._zero = zero
        self._error = False
        self._done = False

    def read(self, line: str) -> None:
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            self._done = True
            return
        try:
            event = from_json(data)
        except ValueError:
            self._error = True
            return
        if not isinstance(event, Mapping) or "error" in event:
            self._error = True
            return
        if _carries_tokens(event):
            self.token_times.append(time.perf_counter() - self._zero)
        usage = event.get("usage")
        if isinstance(usage, Mapping):
            prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
            self.prompt_tokens = prompt if isinstance(prompt, int) else None
            self.output_tokens = output if isinstance(output, int) else None

    def failure(self) -> str | None:
        if self._error:
            return "error in the stream"
        return None if self._done else "stream ended early"


def _carries_tokens(event: Object) -> bool:
    choices = event.get("choices")
    if not is_list(choices):
        return False
    for choice in choices:
        if isinstance(choice, Mapping):
            delta = choice.get("delta")
            found = delta if isinstance(delta, Mapping) else choice
            if any(found.get(key) for key in ("content", "text", "reasoning", "reasoning_content", "tool_calls")):
                return True
    return False
