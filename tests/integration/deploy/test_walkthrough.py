"""deploy/README.md from top to bottom on loopback: its own commands, in its order, with what each step says to look at.

`kubectl` changes the routes of a small gateway in place of a cluster's; the observer has the arguments of its manifest.
Ports are free ones, engines are small. All else is run as it is written.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gateway import Gateway
from service import SMALL, SMALL_ENVIRONMENT, Service, eventually, free_port

from reap_serve.compare.record import Report
from reap_serve.demo.run import demo_files
from reap_serve.plan.record import read_plan
from reap_serve.statistics.merge import merge_files

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "deploy/kubernetes"
TEXT = (ROOT / "deploy/README.md").read_text()
KEY = "sk-walk"
DOMAINS = ("code", "prose")
OBSERVED_REQUESTS, HELDOUT_REQUESTS = 150, 12


def lines_of(step: int) -> list[str]:
    """The command lines of a step."""
    text = re.split(r"^### \d+\. .*$", TEXT, flags=re.MULTILINE)[step]
    return [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]


def manifest(file: str, kind: str) -> Any:
    """The object of a kind in a file of deploy/kubernetes."""
    (found,) = [each for each in yaml.safe_load_all((KUBERNETES / file).read_text()) if each["kind"] == kind]
    return found


class Walk:
    """The state of a walk: the gateway, the servers, and the variables of the runbook."""

    def __init__(self, folder: Path, start: Callable[..., Service]) -> None:
        self.folder = folder
        self.ports = {number: free_port() for number in (8000, 8001, 8002, 8003)}
        self.gateway = Gateway(
            {
                "vllm-base": self.url(8000),
                "vllm-candidate": self.url(8001),
                "reap-observer": self.url(8003),
            }
        )
        self.route: Any = None
        self.statistics = folder / "statistics"
        self.variables = {
            "MODEL": str(demo_files().model),
            "S": str(self.statistics),
            "KEY": KEY,
            "OBSERVER": self.url(8003),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        self._start = start

    def url(self, port: int) -> str:
        """Where the server that the runbook puts on a port answers."""
        return f"http://127.0.0.1:{self.ports[port]}"

    def run(self, line: str, exit_codes: tuple[int, ...] = (0,)) -> str:
        """A line of the runbook; a server is started and waited for. Gives what it printed."""
        words = shlex.split(line)
        if words[0] == "kubectl":
            self._change_route(words)
            return ""
        if words[:2] == ["reap-serve", "serve"]:
            self.serve(shlex.split(self._expanded(line))[2:])
            return ""
        for port, free in self.ports.items():
            line = line.replace(f"127.0.0.1:{port}", f"127.0.0.1:{free}")
        if words[:2] == ["reap-serve", "compare"]:
            options = ("--max-answer-tokens", "16", "--answers-per-slice", "4", "--latency-requests", "8")
            line += f" {shlex.join(options)} --server-args '{shlex.join(SMALL)}'"
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=self.folder,
            env={**os.environ, **SMALL_ENVIRONMENT, **self.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in exit_codes, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _expanded(self, line: str) -> str:
        for name, value in self.variables.items():
            line = line.replace(f'"${name}"', shlex.quote(value))
        return line

    def serve(self, arguments: list[str], port: int | None = None) -> None:
        """`reap-serve serve` in the background, on the free port that stands for its port."""
        if port is None:
            place = arguments.index("--port") + 1
            port, arguments = int(arguments[place]), arguments[: place - 1] + arguments[place + 1 :]
        command = [sys.executable, "-m", "reap_serve", "serve", *arguments, *SMALL]
        # A served name as in compose.yaml and the manifests: requests need no rewriting.
        command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(self.ports[port])]
        # Not among the variables of the runbook: servers that `compare` starts for itself would ask it for the key.
        variables = {**self.variables, "VLLM_API_KEY": KEY}
        self._start(f"port-{port}", ["env", "-C", str(self.folder), *command], self.url(port), variables).wait()

    def start_workload(self, file: str, port: int) -> None:
        """The server of a manifest's Deployment."""
        (container,) = manifest(file, "Deployment")["spec"]["template"]["spec"]["containers"]
        values = {"$(MODEL)": self.variables["MODEL"], "$(SERVED_NAME)": "model", "/statistics": str(self.statistics)}
        self.serve([values.get(word, word) for word in container["args"]][1:], port)

    def _change_route(self, words: list[str]) -> None:
        if "apply" in words:
            folder = ROOT / words[-1]
            self.route = manifest("base/httproute.yaml", "HTTPRoute")
            patches = yaml.safe_load((folder / "kustomization.yaml").read_text()).get("patches", [])
            operations = [each for patch in patches for each in yaml.safe_load(patch["patch"])]
        else:
            operations = json.loads(words[words.index("-p") + 1])
        self.route = patched(self.route, operations)
        self.gateway.apply(self.route)

    def send(self, count: int, *, tokens: int = 24) -> dict[str, Any]:
        """Users' traffic to the gateway, by `reap-serve replay`."""
        answer = self.run(
            f"reap-serve replay traffic.jsonl --url {self.gateway.url} --api-key-env KEY --model model --tag-slices "
            f"--concurrency 6 --limit {count} --max-output-tokens {tokens} --json"
        )
        found = json.loads(answer)
        assert isinstance(found, dict)
        return found


def patched(document: Any, operations: list[dict[str, Any]]) -> Any:
    """A document after JSON patches that replace."""
    document = copy.deepcopy(document)
    for operation in operations:
        assert operation["op"] == "replace"
        *path, last = [int(step) if step.isdigit() else step for step in operation["path"].strip("/").split("/")]
        place = document
        for step in path:
            place = place[step]
        place[last] = operation["value"]
    return document


@pytest.fixture(scope="module")
def walk(start: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    folder = tmp_path_factory.mktemp("walk")
    files = demo_files()
    for name, file, count in (
        ("traffic", files.calibration, OBSERVED_REQUESTS),
        ("heldout", files.heldout, HELDOUT_REQUESTS),
    ):
        lines = [file(domain).read_text().splitlines(keepends=True)[:count] for domain in DOMAINS]
        (folder / f"{name}.jsonl").write_text("".join(line for pair in zip(*lines, strict=True) for line in pair))
    walking = Walk(folder, start)
    try:
        yield walking
    finally:
        walking.gateway.close()


def test_steps_1_to_3_observe_the_mirrored_traffic_and_plan(walk: Walk) -> None:
    mirror, one_machine = lines_of(1)
    # Production is the server of the one-machine line; what it counts by itself goes elsewhere.
    observed, walk.variables["S"] = walk.variables["S"], str(walk.folder / "production")
    walk.run(one_machine)
    walk.variables["S"] = observed
    walk.start_workload("base/observer.yaml", 8003)
    walk.run(mirror)
    sent = walk.send(2 * OBSERVED_REQUESTS)
    assert (sent["requests"], sent["failed"]) == (2 * OBSERVED_REQUESTS, 0)
    walk.gateway.wait_for_mirrors()
    assert walk.gateway.served == {"vllm-base": sent["requests"]}
    assert walk.gateway.mirrored == {"reap-observer": sent["requests"] // 5}

    status, flush, show = lines_of(2)
    seen = json.loads(walk.run(status))
    assert seen["recording"]
    assert seen["complete"]
    assert seen["tokens_observed"] > 1000
    walk.run(flush)
    assert "reap" in walk.run(show)
    statistics = merge_files([str(walk.statistics)])
    assert set(statistics.header.slices) == set(DOMAINS)

    (plan,) = lines_of(3)
    walk.run(plan)
    made = read_plan(walk.folder / "plan.json")
    assert {len(layer.kept) / (len(layer.kept) + len(layer.dropped)) for layer in made.layers} == {0.75}


def test_steps_4_and_5_try_the_plan_and_prune(walk: Walk) -> None:
    serve, switch_on, compare, switch_off = lines_of(4)
    walk.run(serve)
    assert json.loads(walk.run(switch_on))["default"] == "trial"
    walk.run(compare)
    assert json.loads(walk.run(switch_off))["default"] is None
    trial = Report.model_validate_json((walk.folder / "trial/report.json").read_text())
    assert set(trial.slices) == set(DOMAINS)
    prune, verify, gate = lines_of(5)
    walk.run(prune)
    walk.run(verify)
    # What this model loses decides whether the gate stops here; the next test goes on as one who accepts it.
    walk.run(gate, exit_codes=(0, 1))
    report = Report.model_validate_json((walk.folder / "report/report.json").read_text())
    for name in DOMAINS:
        masked, pruned = trial.slices[name].quality, report.slices[name].quality
        assert masked.perplexity_ratio != 1.0, "the mask must matter"
        assert pruned.perplexity_ratio == pytest.approx(masked.perplexity_ratio, rel=0.01)


def test_steps_6_to_8_shift_the_traffic_and_take_it_back(walk: Walk) -> None:
    canary, one_machine = lines_of(6)
    walk.run(one_machine)
    walk.run(canary)
    walk.gateway.served.clear()
    assert walk.send(40, tokens=4)["failed"] == 0
    assert walk.gateway.served == {"vllm-base": 36, "vllm-candidate": 4}

    (switch,) = lines_of(7)
    walk.run(switch)
    walk.gateway.served.clear()
    assert walk.send(40, tokens=4)["failed"] == 0
    assert walk.gateway.served == {"vllm-base": 20, "vllm-candidate": 20}

    # What step 6 says to look at; a tenth of the steps measure the dropped gate mass.
    series = {"reap_serve_dropped_gate_mass_fraction", "vllm:time_to_first_token_seconds_bucket"}
    eventually(lambda: series <= _metrics(walk.url(8001)), "the candidate's series")

    (roll_back,) = lines_of(8)
    walk.run(roll_back)
    walk.gateway.served.clear()
    assert walk.send(20, tokens=4)["failed"] == 0
    assert walk.gateway.served == {"vllm-base": 20}
    assert set(walk.gateway.statuses) == {200}, "no user's request failed on the way"


def _metrics(url: str) -> set[str]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def test_the_walk_is_the_whole_runbook() -> None:
    steps = re.findall(r"^### (\d+)\. ", TEXT, flags=re.MULTILINE)
    assert steps == [str(number) for number in range(1, 10)]
    # The lines of step 9, the loop as a job, are tried in test_cycle_manifest and test_cycle_walk.
    assert [len(lines_of(int(step))) for step in steps] == [2, 3, 1, 4, 3, 2, 1, 1, 2]
