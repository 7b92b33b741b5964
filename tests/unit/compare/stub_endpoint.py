"""A vLLM endpoint of characters: what `compare` asks for, answered by a model whose distributions are known exactly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

VOCABULARY = 128
END = 3


def bigram_model(seed: int, noise: float = 0.0) -> npt.NDArray[np.float64]:
    """Log-probabilities [previous, next]; those of one seed differ by the noise only."""
    generator = np.random.default_rng(seed)
    logits = 3.0 * generator.normal(size=(VOCABULARY, VOCABULARY))
    logits += noise * np.random.default_rng(seed + 1).normal(size=logits.shape)
    largest = logits.max(axis=1, keepdims=True)
    normalised: npt.NDArray[np.float64] = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return normalised


@dataclass
class StubEndpoint:
    """The server; `url` is where it listens while the block is open.

    Attributes:
        logprobs: [previous, next].
        answer: Text of the greedy answer to a prompt's text.
        max_model_len: As /v1/models gives it.
        tool_parser: Whether chat requests with tools are answered, with `tool_calls`, or refused.
        tool_calls: What the parser finds.
        fail_paths: Paths that answer with HTTP 500 and quote the request, as vLLM may.
        replies: Documents given by path in place of the true ones.
        masks: [previous, next] under each plan that may be loaded; None for an endpoint that takes none.
        loaded: Names of the plans, by the experts that their first layer keeps.
        seen: Bodies of all requests, with their paths.
    """

    logprobs: npt.NDArray[np.float64]
    answer: Callable[[str], str] = lambda prompt: "ok"
    finish_reason: str = "stop"
    max_model_len: int = 4096
    tool_parser: bool = False
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    fail_paths: tuple[str, ...] = ()
    replies: dict[str, Any] = field(default_factory=dict)
    masks: dict[tuple[int, ...], npt.NDArray[np.float64]] | None = None
    loaded: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> StubEndpoint:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            do_PUT = do_POST
            do_DELETE = do_GET

            def _reply(self, body: dict[str, Any]) -> None:
                stub.seen.append((self.path, body))
                status, content = stub.respond(self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *details: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if path in self.fail_paths:
            return 500, json.dumps({"error": f"cannot serve {json.dumps(body)}"}).encode()
        if path in self.replies:
            reply = self.replies[path]
            return 200, reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        if path == "/metrics":
            labels = 'engine="0",kv_cache_size_tokens="2048",kv_cache_max_concurrency="2.5"'
            return 200, f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{labels}}} 1.0\n".encode()
        if path.startswith("/v1/reap/mask"):
            return self.mask(path, body)
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "stub", "max_model_len": self.max_model_len}]}).encode()
        if path == "/tokenize":
            return 200, json.dumps({"tokens": self.tokenize(body)}).encode()
        if path == "/v1/chat/completions":
            return self.chat(body)
        return 200, json.dumps({"choices": [self.complete(body)]}).encode()

    def mask(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        if self.masks is None:
            return 404, b'{"detail": "Not Found"}'
        if not body:
            del self.loaded[path.rpartition("/")[2]]
            return 200, b"{}"
        kept = tuple(body["plan"]["layers"][0]["kept"])
        if kept not in self.masks:
            return 400, b'{"error": {"message": "the plan keeps too few experts", "code": 400}}'
        assert body["activate"] is False
        self.loaded[body["name"]] = kept
        return 200, b"{}"

    def model_of(self, body: dict[str, Any]) -> npt.NDArray[np.float64]:
        plan = body.get("vllm_xargs", {}).get("reap_plan", "base")
        return self.logprobs if plan == "base" or self.masks is None else self.masks[self.loaded[plan]]

    def tokenize(self, body: dict[str, Any]) -> list[int]:
        if "prompt" in body:
            return [ord(character) for character in body["prompt"]]
        tokens: list[int] = []
        for message in body["messages"]:
            tokens += [*(ord(character) for character in f"{message['role'][0]}:{message['content']}"), END]
        return tokens + ([ord("a"), ord(":")] if body["add_generation_prompt"] else [])

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = body["prompt"]
        text = self.answer("".join(chr(token) for token in tokens))[: body["max_tokens"]]
        choice: dict[str, Any] = {"text": text, "finish_reason": self.finish_reason, "index": 0}
        if "return_token_ids" in body:
            choice["token_ids"] = [ord(character) for character in text]
        if "prompt_logprobs" in body:
            model = self.model_of(body)
            rows = [self.row(model, *pair, body["prompt_logprobs"]) for pair in pairwise(tokens)]
            choice["prompt_logprobs"] = [None, *rows]
        return choice

    def row(
        self, model: npt.NDArray[np.float64], previous: int, token: int, k: int
    ) -> dict[str, dict[str, float | int]]:
        logprobs = model[previous].astype(np.float32)
        order = np.argsort(-logprobs, kind="stable")
        ranks = {int(other): rank for rank, other in enumerate(order, start=1)}
        wanted = {*order[:k].tolist(), token}
        return {str(other): {"logprob": float(logprobs[other]), "rank": ranks[other]} for other in wanted}

    def chat(self, body: dict[str, Any]) -> tuple[int, bytes]:
        if body.get("stream"):
            events = [{"choices": [{"delta": {"content": "x"}}]}] * 3
            usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
            lines = [f"data: {json.dumps(event)}\n\n" for event in [*events, usage]]
            return 200, "".join([*lines, "data: [DONE]\n\n"]).encode()
        if not self.tool_parser:
            return 400, b'{"error": "auto tool choice requires --enable-auto-tool-choice"}'
        return 200, json.dumps({"choices": [{"message": {"content": None, "tool_calls": self.tool_calls}}]}).encode()
