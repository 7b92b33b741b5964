"""Two replicas that share the traffic and a folder of statistics count what one of them counts of all of it.

Both servers are started as a deployment starts them. After the shared run the first one gets all the traffic once more;
the merged files of both replicas must equal its files: counts exactly, sums to the precision of float32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from service import SMALL, Service, call, free_port

from reap_serve.demo.run import demo_files
from reap_serve.statistics.merge import merge_files
from reap_serve.statistics.record import Statistics, is_count

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

REQUESTS_PER_SLICE = 30
SLICES = ("code", "prose", "german")
ANSWER_TOKENS = 8
SETTINGS = {"minimum_tokens": 1, "flush_seconds": 3600.0}


@dataclass(frozen=True)
class Replicas:
    """Two servers, the folder of their statistics as a path, and as they were given it."""

    urls: tuple[str, str]
    folder: Path


@pytest.fixture(scope="module")
def replicas(start: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Replicas:
    folder = tmp_path_factory.mktemp("shared") / "statistics"
    services = []
    # The same place as a path and as an fsspec URL.
    for number, directory in enumerate((str(folder), f"file://{folder}")):
        port = free_port()
        command = [sys.executable, "-m", "reap_serve", "serve", str(demo_files().model), "--observe", directory]
        # Every token is recorded: no budget draws some of them.
        command += ["--overhead-budget", "none"]
        command += ["--served-model-name", "model", "--no-enable-prefix-caching", "--dtype", "float32", *SMALL]
        command += ["--additional-config", json.dumps({"reap_serve": SETTINGS})]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        services.append(start(f"replica-{number}", command, f"http://127.0.0.1:{port}"))
    for service in services:
        service.wait()
    return Replicas((services[0].url, services[1].url), folder)


def requests() -> list[dict[str, object]]:
    """Chat requests of several slices in turn."""
    files = demo_files()
    lines = []
    for name in SLICES:
        with files.heldout(name).open() as handle:
            lines.append([json.loads(line)["body"]["messages"] for line in islice(handle, REQUESTS_PER_SLICE)])
    return [
        {
            "model": "model",
            "messages": messages,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "vllm_xargs": {"reap_slice": name},
        }
        for row in zip(*lines, strict=True)
        for name, messages in zip(SLICES, row, strict=True)
    ]


def send(urls: tuple[str, ...], bodies: list[dict[str, object]]) -> list[str]:
    """The answers of requests that go to the servers in turn, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda numbered: call(urls[numbered[0] % len(urls)] + "/v1/chat/completions", numbered[1]),
            enumerate(bodies),
        )
        return [answer["choices"][0]["message"]["content"] for answer in answers]


def collected(replicas: Replicas, into: Path) -> Statistics:
    """What the servers wrote since the last time, merged; the files are moved away and the servers start at nothing."""
    for url in replicas.urls:
        # A step that has answered may still be counting.
        time.sleep(0.5)
        call(f"{url}/v1/reap/flush", method="POST")
        call(f"{url}/v1/reap/reset", method="POST")
    into.mkdir()
    for file in replicas.folder.iterdir():
        file.rename(into / file.name)
    return merge_files([str(into)])


def by_slice(statistics: Statistics) -> dict[str, np.ndarray]:
    """The sums by name, the slices in the order of `SLICES`."""
    order = [statistics.header.slices.index(name) for name in SLICES]
    return {name: values[order] for name, values in statistics.fields_by_name().items()}


def test_the_sum_of_two_replicas_is_one_with_all_the_traffic(replicas: Replicas, tmp_path: Path) -> None:
    bodies = requests()
    shared_answers = send(replicas.urls, bodies)
    shared = collected(replicas, tmp_path / "shared")
    assert len(list((tmp_path / "shared").iterdir())) == len(shared.header.windows) == 2
    lone_answers = send(replicas.urls[:1], bodies)
    lone = collected(replicas, tmp_path / "lone")
    assert len(lone.header.windows) == 1
    assert shared_answers == lone_answers
    assert set(shared.header.slices) == set(lone.header.slices) == set(SLICES)
    assert shared.header.model == lone.header.model
    for window in (*shared.header.windows, *lone.header.windows):
        assert window.complete
    found, expected = by_slice(shared), by_slice(lone)
    assert found.keys() == expected.keys()
    assert expected["token_count_SPLE"].sum() > len(bodies) * ANSWER_TOKENS
    for name, values in expected.items():
        if is_count(name):
            np.testing.assert_array_equal(found[name], values, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
