"""The loop as a job beside a server that observes: a candidate, nothing to do, another one when the domain changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import KEY, LiveServer

from reap_serve.demo.run import demo_files
from reap_serve.prune.manifest import read_manifest

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIG = """
model = "{model}"
state = "state"
served = "current"
[statistics]
paths = ["stats"]
min_tokens = 5000
[traffic]
heldout_slices = {{ {slice} = "{heldout}" }}
[choose]
keep_experts = 16
[gates]
trial = ["slices.{slice}.quality.perplexity_ratio<1.25"]
checkpoint = ["slices.{slice}.quality.loop_fraction_candidate<0.9"]
[engine]
server_args = "--enforce-eager --max-model-len 1024"
answers_per_slice = 4
max_answer_tokens = 16
latency_requests = 4
"""


def reap_serve(*words: str, cwd: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "reap_serve", *words, "--json"]
    environment = {**os.environ, "ENDPOINT_KEY": KEY}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


class Site:
    """One machine: a server that observes what it answers, and the cycle's configuration."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = demo_files()
        options = ["--observe", str(root / "stats"), "--overhead-budget", "none", "--enforce-eager"]
        self.server = LiveServer(self.files.model, root / "log", options, {"minimum_tokens": 1})

    def heldout(self, domain: str) -> None:
        """Recorded requests of a domain judge from now on."""
        lines = self.files.heldout(domain).read_text().splitlines()[:16]
        (self.root / "heldout.jsonl").write_text("\n".join(lines) + "\n")
        text = CONFIG.format(model=self.files.model, slice=domain, heldout="heldout.jsonl")
        (self.root / "cycle.toml").write_text(text)

    def clients_ask(self, domain: str, lines: slice) -> None:
        """A window of a domain's traffic, answered by the server and written by it."""
        traffic = self.root / "traffic.jsonl"
        traffic.write_text("\n".join(self.files.calibration(domain).read_text().splitlines()[lines]) + "\n")
        where = ("--url", self.server.url, "--api-key-env", "ENDPOINT_KEY", "--model", "tiny", "--concurrency", "16")
        done = reap_serve("replay", str(traffic), *where, "--max-output-tokens", "96", cwd=self.root)
        assert done["failed"] == 0
        assert self.server.reap("POST", "flush").status_code == 200

    def cycle(self) -> dict[str, object]:
        return reap_serve("cycle", "cycle.toml", cwd=self.root)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose server is up."""
    found = Site(tmp_path)
    try:
        found.server.wait()
        yield found
    finally:
        found.server.stop()


def test_a_changed_domain_brings_another_candidate(site: Site) -> None:
    site.heldout("code")
    site.clients_ask("code", slice(0, 80))
    first = site.cycle()
    assert first["decision"] == "candidate", first["reason"]
    checkpoint = Path(str(first["candidate"]))
    assert read_manifest(checkpoint).experts_after == 16
    assert Path(str(first["report"])).is_file()

    # The operator switches; the same kind of traffic goes on.
    (site.root / "current").symlink_to(checkpoint)
    site.clients_ask("code", slice(80, 160))
    second = site.cycle()
    assert second["decision"] == "nothing", second["reason"]

    # The traffic is another one from now on, and last week's windows have aged out.
    for path in (site.root / "stats").iterdir():
        path.unlink()
    site.heldout("arithmetic")
    site.clients_ask("arithmetic", slice(0, 80))
    third = site.cycle()
    assert third["decision"] == "candidate", third["reason"]
    assert third["candidate"] != first["candidate"]
    regained = third["regained"]
    assert isinstance(regained, dict)
    # Half of the experts by code costs arithmetic some 0.6 nats; by itself next to nothing.
    assert regained["arithmetic"] > 0.1
    assert "regains" in str(third["reason"])
    assert checkpoint.is_dir()
