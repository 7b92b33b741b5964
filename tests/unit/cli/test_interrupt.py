"""Ctrl-C: one line, exit code 130, and nothing under the name of the output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reap_serve.demo.run import demo_files

LINE = "error: interrupted; run the command again"
# Every piece of a copy or of a reading takes this long, so that the signal finds it under way.
SLOW = """
import time
from reap_serve.prune import copy, digests
def slowed(name, module, function):
    def wait(*arguments):
        open(marker, "w").close()
        time.sleep(0.3)
        return function(*arguments)
    setattr(module, name, wait)
slowed("_copy", copy.Copier, copy.Copier._copy)
slowed("_digest_file", digests, digests._digest_file)
"""


def heed_interrupts() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C; these tests may run there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def running(marker: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The program, slowed down, as a process of a terminal would be."""
    code = f"import sys\nmarker = {str(marker)!r}\n{SLOW}\nfrom reap_serve.cli.app import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_interrupts,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if is_so():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("the command did not begin")


def interrupted(process: subprocess.Popen[str]) -> None:
    """Sends what Ctrl-C sends, and looks at the end."""
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == LINE
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def model() -> Path:
    return demo_files().model


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Half of the experts of each layer, by hand."""
    half = {"kept": list(range(16)), "dropped": list(range(16, 32))}
    layers = [{"layer": f"model.layers.{index}.mlp.experts", "index": index, **half} for index in range(4)]
    document = {"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    return tmp_path / "plan.json"


def test_prune_and_its_second_run(model: Path, plan: Path, tmp_path: Path) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    with running(marker, "prune", str(model), str(plan), str(out)) as process:
        wait_for(marker.exists, process)
        interrupted(process)
    assert not out.exists()
    done = subprocess.run(
        [sys.executable, "-m", "reap_serve", "prune", str(model), str(plan), str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marker", "out", "plan.json"]


def test_verify(model: Path, plan: Path, tmp_path: Path) -> None:
    out, marker = tmp_path / "out", tmp_path / "marker"
    subprocess.run([sys.executable, "-m", "reap_serve", "prune", str(model), str(plan), str(out)], check=True)
    with running(marker, "verify", str(out)) as process:
        wait_for(marker.exists, process)
        interrupted(process)


def test_convert_of_a_stream_that_does_not_end(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with running(tmp_path / "marker", "traffic", "convert", "-", "--output", str(out)) as process:
        assert process.stdin is not None
        process.stdin.write('{"model": "m", "messages": [{"role": "user", "content": "a"}]}\n' * 50_000)
        process.stdin.flush()
        wait_for(lambda: any(path.name.endswith(".partial") for path in tmp_path.iterdir()), process)
        interrupted(process)
    assert os.listdir(tmp_path) == []


def test_replay_to_a_server_that_does_not_answer(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    traffic = demo_files().heldout("code")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with running(tmp_path / "marker", "replay", str(traffic), "--url", url) as process:
            connection, _ = server.accept()
            with connection:
                interrupted(process)
