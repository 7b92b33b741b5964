"""What a live server recorded, against offline `observe` of the same file: once replayed, once captured on its way.

A served answer enters the model token by token, a teacher-forced one in one prefill. Both give the same tokens by slice
and phase when the answers are the same, nothing comes from the prefix cache, and the text of each answer is written
with the tokens that were generated (a model may spell a text in pieces that its tokenizer would not have chosen; such
answers are left out here). In float32 each token then takes the same experts; in bfloat16 the two ways round
differently, and a token whose experts are nearly tied takes another one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from live_server import KEY, LiveServer

from reap_serve.demo.run import demo_files
from reap_serve.statistics.file import read_statistics
from reap_serve.statistics.merge import select_slices
from reap_serve.statistics.record import Statistics
from reap_serve.statistics.saliency import mix_slices, saliency

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOMAINS = ("arithmetic", "code", "german", "prose", "tools")
REQUESTS_PER_DOMAIN = 6
STREAMS = {"float32": 4, "bfloat16": 1}
Body = dict[str, Any]


@dataclass(frozen=True)
class Observed:
    """Statistics of the same requests.

    Attributes:
        dtype: Of the model.
        live: While they were asked and captured.
        replayed: While the captured file was replayed.
        offline: Of `observe` on the captured file.
    """

    dtype: str
    live: Statistics
    replayed: Statistics
    offline: Statistics


def chats() -> Iterator[Body]:
    """Requests of every domain, some streamed, some that name their domain in `metadata` and some in `vllm_xargs`.

    Some answers end by themselves, some at their limit.
    """
    for domain in DOMAINS:
        with demo_files().heldout(domain).open() as lines:
            for number, line in enumerate(islice(lines, REQUESTS_PER_DOMAIN)):
                recorded = json.loads(line)["body"]
                kept = {key: recorded[key] for key in ("messages", "tools") if key in recorded}
                settings = {"model": "tiny", "max_tokens": 48, "temperature": 0.0, "stream": number % 2 == 0}
                yield {**kept, **settings, ("metadata" if number % 3 else "vllm_xargs"): {"reap_slice": domain}}


def ask(server: LiveServer, body: Body) -> httpx.Response:
    """One chat."""
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=300
    )
    assert response.status_code == 200, response.text
    return response


def is_spelled_by_the_tokenizer(server: LiveServer, encode: Callable[[str], list[int]], body: Body) -> bool:
    """Whether the tokenizer would write the answer's text with the tokens that the model generated."""
    choice = ask(server, {**body, "stream": False, "return_token_ids": True, "tool_choice": "none"}).json()["choices"][
        0
    ]
    ended = choice["finish_reason"] == "stop"
    generated = choice["token_ids"][:-1] if ended else choice["token_ids"]
    return encode(choice["message"]["content"]) == generated


def window(server: LiveServer, directory: Path, serve: Callable[[], object]) -> Statistics:
    """What is recorded while `serve` runs."""
    before = set(directory.glob("*.safetensors"))
    assert server.reap("POST", "reset").status_code == 200
    serve()
    assert server.reap("POST", "flush").status_code == 200
    (written,) = set(directory.glob("*.safetensors")) - before
    return read_statistics(str(written))


def captured_lines(directory: Path, count: int) -> list[str]:
    """What the middleware wrote, as soon as it is so many lines."""
    deadline = time.monotonic() + 30
    while True:
        lines = [line for path in sorted(directory.glob("*.jsonl")) for line in path.read_text().splitlines()]
        if len(lines) == count:
            return lines
        assert time.monotonic() < deadline, f"{len(lines)} lines of {count}"
        time.sleep(0.1)


def reap_serve(*arguments: str) -> dict[str, Any]:
    """One of our commands; what it prints."""
    command = [sys.executable, "-m", "reap_serve", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "ENDPOINT_KEY": KEY}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)
    assert isinstance(printed, dict)
    return printed


@pytest.fixture(scope="module", params=list(STREAMS))
def observed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """One server: it is asked, captured, and asked again by `replay`; then `observe` runs on the captured file."""
    from transformers import AutoTokenizer

    dtype: str = request.param
    root = tmp_path_factory.mktemp(dtype)
    statistics, capture, traffic = root / "statistics", root / "capture", root / "captured.jsonl"
    model = demo_files().model
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = ["--observe", str(statistics), "--overhead-budget", "none", "--flush-seconds", "3600"]
    options += ["--enforce-eager", "--no-enable-prefix-caching"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    options += ["--middleware", "reap_serve.traffic.capture.CaptureMiddleware"]
    variables = {"REAP_SERVE_CAPTURE_DIR": str(capture)}
    server = LiveServer(model, root / "log", options, {"minimum_tokens": 0}, dtype=dtype, variables=variables)
    try:
        server.wait()

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        every = list(chats())
        bodies = [body for body in every if is_spelled_by_the_tokenizer(server, encode, body)]
        assert len(bodies) >= 0.8 * len(every)

        def serve() -> None:
            with ThreadPoolExecutor(STREAMS[dtype]) as pool:
                list(pool.map(lambda body: ask(server, body), bodies))

        live = window(server, statistics, serve)
        # The first question of each request was captured, too.
        lines = captured_lines(capture, len(every) + len(bodies))[len(every) :]
        traffic.write_text("".join(f"{line}\n" for line in lines))
        replayed = window(server, statistics, lambda: replay(server, traffic, STREAMS[dtype]))
    finally:
        server.stop()
    output = root / "offline.safetensors"
    engine = json.dumps({"dtype": dtype, "max_model_len": 512})
    reap_serve(
        *("observe", str(model), str(traffic), "--output", str(output)),
        *("--recorder", "deferred", "--engine-args", engine),
    )
    return Observed(dtype, live, replayed, read_statistics(str(output)))


def replay(server: LiveServer, traffic: Path, concurrency: int) -> None:
    """Sends the file's requests again."""
    printed = reap_serve(
        *("replay", str(traffic), "--url", server.url, "--api-key-env", "ENDPOINT_KEY"),
        *("--tag-slices", "--concurrency", str(concurrency)),
    )
    assert printed["failed"] == 0
    assert printed["requests"] > 0


def in_order(statistics: Statistics, slices: Sequence[str] = DOMAINS) -> Statistics:
    """The statistics with the slices in a fixed order."""
    assert set(statistics.header.slices) == set(slices)
    return select_slices(statistics, slices)


def require_same(served: Statistics, forced: Statistics, dtype: str) -> None:
    """Tokens exactly; experts and saliency exactly in float32, up to rounding in bfloat16."""
    assert served.header.complete
    assert forced.header.complete
    served, forced = in_order(served), in_order(forced)
    np.testing.assert_array_equal(served.layer_token_count_SPL, forced.layer_token_count_SPL)
    counts, expected = served.sums.token_count_SPLE, forced.sums.token_count_SPLE
    moved = np.abs(counts - expected).sum() / 2 / expected.sum()
    scores_LE, expected_LE = (saliency(mix_slices(each), "reap") for each in (served, forced))
    if dtype == "float32":
        assert moved == 0
        np.testing.assert_allclose(scores_LE, expected_LE, rtol=1e-4)
    else:
        # 8 bits of mantissa, and the few routes that moved: of a hundred or two an expert here.
        assert moved < 0.01
        error_LE = np.abs(scores_LE / expected_LE - 1)
        assert np.median(error_LE) < 0.01
        assert np.max(error_LE) < 0.06


def test_a_replayed_file_gives_what_observing_it_gives(observed: Observed) -> None:
    require_same(observed.replayed, observed.offline, observed.dtype)
    assert observed.offline.layer_token_count_SPL.min() > 0


def test_captured_traffic_gives_what_was_observed_live(observed: Observed) -> None:
    require_same(observed.live, observed.offline, observed.dtype)
    require_same(observed.live, observed.replayed, observed.dtype)
    assert observed.live.header.windows[0].recorder == "read"
