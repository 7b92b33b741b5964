"""The services of deploy/compose.yaml as plain processes, from an installed wheel, with the very configuration files.

What compose would do is done here by hand: the image is the environment with the wheel, a volume is a folder, and a
service's name is an address of its own on loopback, which Prometheus finds in a hosts file of its own mount namespace.
Grafana is in no Debian or Python registry: its dashboard's queries are asked of Prometheus instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from service import FROM_WHEEL, SMALL, Service, call, eventually, free_port

from reap_serve.demo.run import demo_files

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DEPLOY = Path(__file__).parents[3] / "deploy"
ADDRESSES = {"base": "127.0.0.2", "candidate": "127.0.0.3"}
PORT = 8000
REQUESTS = 24


def command_of(service: str, folders: dict[str, Path], variables: dict[str, str]) -> list[str]:
    """A service's command line with its variables and volumes put in."""
    words = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][service]["command"]
    filled = [re.sub(r"\$\{(\w+)[^}]*\}", lambda match: variables[match[1]], word) for word in words]
    return [str(folders.get(word, word)) for word in filled]


@pytest.fixture(scope="module")
def pruned(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model without the upper half of its experts, made by the installed program."""
    folder = tmp_path_factory.mktemp("pruned")
    config = json.loads((demo_files().model / "config.json").read_text())
    half, count = config["num_experts"] // 2, config["num_experts"]
    kept, dropped = list(range(half)), list(range(half, count))
    layers = [
        {"layer": f"model.layers.{index}.mlp.experts", "index": index, "kept": kept, "dropped": dropped}
        for index in range(config["num_hidden_layers"])
    ]
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}))
    command = [str(installed / "reap-serve"), "prune", str(demo_files().model), str(plan), str(folder / "model")]
    run = subprocess.run(command, env={**os.environ, **FROM_WHEEL}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return folder / "model"


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume") / "statistics"


@pytest.fixture(scope="module")
def prometheus(
    start: Callable[..., Service],
    installed: Path,
    pruned: Path,
    statistics: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Service:
    """Prometheus over base and candidate; all three answer."""
    if shutil.which("prometheus") is None or not _may_unshare():
        pytest.skip("needs Debian's package prometheus, and unshare of mount namespaces")
    for address in ADDRESSES.values():
        with socket.socket() as probe:
            probe.bind((address, PORT))
    folders = {"/statistics": statistics, "/models/pruned": pruned}
    variables = {"MODEL": str(demo_files().model), "SERVED_NAME": "model"}
    servers = []
    for name, address in ADDRESSES.items():
        command = [str(installed / "reap-serve"), *command_of(name, folders, variables), *SMALL]
        command += ["--host", address, "--port", str(PORT)]
        settings = {"reap_serve": {"minimum_tokens": 1, "metrics_seconds": 1.0, "drift_fraction": 1.0}}
        command += ["--additional-config", json.dumps(settings)]
        servers.append(start(name, command, f"http://{address}:{PORT}", FROM_WHEEL))
    for server in servers:
        server.wait()
    folder = tmp_path_factory.mktemp("prometheus")
    names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
    port = free_port()
    prometheus_line = (
        f'mount --bind "{folder}/hosts" /etc/hosts && '
        f'exec prometheus --config.file="{DEPLOY}/prometheus/prometheus.yml" '
        f'--storage.tsdb.path="{folder}/data" --web.listen-address=127.0.0.1:{port}'
    )
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", prometheus_line]
    service = start("prometheus", command, f"http://127.0.0.1:{port}")
    service.wait("/-/ready")
    return service


def _may_unshare() -> bool:
    command = ["unshare", "--mount", "--map-root-user", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


@pytest.fixture(scope="module")
def scraped(prometheus: Service) -> Service:
    """After traffic to both, and long enough for rates: three scrapes, and the rules' evaluation after them."""
    eventually(lambda: len(value(prometheus, "up == 1")) == 2, "both are scraped")
    with demo_files().heldout("code").open() as lines:
        prompts = [json.loads(line)["body"]["messages"] for line, _ in zip(lines, range(REQUESTS), strict=False)]
    for address in ADDRESSES.values():
        for messages in prompts:
            body = {"model": "model", "messages": messages, "max_tokens": 8, "temperature": 0.0}
            assert call(f"http://{address}:{PORT}/v1/chat/completions", body)["usage"]["completion_tokens"] > 0
    done = 'sum by (role) (increase(vllm:request_success_total{finished_reason="length"}[5m])) > 0'
    eventually(lambda: len(value(prometheus, done)) == 2, "requests show in the rates")
    p95 = "role:vllm_time_to_first_token_seconds:p95"
    eventually(lambda: len(value(prometheus, p95)) == 2, "the recording rules were evaluated")
    return prometheus


def value(prometheus: Service, query: str) -> dict[str, float]:
    """The samples of an instant query, by role; of several of a role the last one stays."""
    answer = call(f"{prometheus.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
    assert answer["status"] == "success"
    return {each["metric"].get("role", ""): float(each["value"][1]) for each in answer["data"]["result"]}


def test_every_rule_of_the_files_is_healthy(scraped: Service) -> None:
    groups = call(f"{scraped.url}/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    written = [
        rule
        for file in ("rules.yml", "alerts.yml")
        for group in yaml.safe_load((DEPLOY / "prometheus" / file).read_text())["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) == len(written)
    eventually(
        lambda: {each["health"] for group in _groups(scraped) for each in group["rules"]} == {"ok"},
        "every rule was evaluated without an error",
    )
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert "ReapServerDown" not in firing


def _groups(prometheus: Service) -> list[dict[str, Any]]:
    groups = call(f"{prometheus.url}/api/v1/rules")["data"]["groups"]
    assert isinstance(groups, list)
    return groups


def dashboard_queries() -> list[str]:
    """The queries of the file that Grafana is provisioned with; a cycle's metrics come from a job, not from servers."""
    panels = json.loads((DEPLOY / "grafana/reap-serve.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [query for query in queries if "reap_serve_cycle_" not in query]


def analysis_queries() -> list[str]:
    """The queries of the template for Argo Rollouts."""
    text = (DEPLOY / "kubernetes/canary/analysis-template.yaml").read_text()
    return [metric["provider"]["prometheus"]["query"] for metric in yaml.safe_load(text)["spec"]["metrics"]]


def test_the_dashboards_and_the_analysis_queries_are_answered(scraped: Service) -> None:
    queries = [re.sub(r"\$__rate_interval", "1m", query) for query in dashboard_queries()] + analysis_queries()
    assert len(queries) > 20
    answered = {query: bool(value(scraped, query)) for query in queries}
    # What did not happen has no value: a repetition, a preemption, a failed write.
    assert sum(answered.values()) > len(queries) // 3, [query for query, found in answered.items() if not found]
    assert value(scraped, 'role:vllm_time_to_first_token_seconds:p95{role="candidate"}')["candidate"] > 0


def test_servers_expose_every_series_that_is_read(scraped: Service) -> None:
    names = set[str]()
    for address in ADDRESSES.values():
        with urllib.request.urlopen(f"http://{address}:{PORT}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        names |= {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    known_metrics = _known_metrics()
    rules = [*known_metrics.rules("rules.yml"), *known_metrics.rules("alerts.yml")]
    queries = [rule["expr"] for rule in rules] + dashboard_queries() + analysis_queries()
    read = set().union(*map(known_metrics.read_by, queries)) - known_metrics.recorded() - {"up"}
    # Those of a cycle come from a job.
    read = {name for name in read if not name.startswith("reap_serve_cycle_")}
    assert len(read) > 15
    # A plan by hand predicts no gate mass.
    assert read - names <= {"reap_serve_dropped_gate_mass_planned_fraction"}


def _known_metrics() -> Any:
    path = Path(__file__).parents[2] / "unit/deploy/known_metrics.py"
    spec = importlib.util.spec_from_file_location("known_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["known_metrics"] = module
    spec.loader.exec_module(module)
    return module


def test_base_observes_and_the_candidate_does_not(scraped: Service, statistics: Path) -> None:
    assert value(scraped, "reap_serve_recording") == {"base": 1.0, "candidate": 0.0}
    base, candidate = (f"http://{address}:{PORT}/v1/reap" for address in ADDRESSES.values())
    call(f"{base}/flush", method="POST")
    assert call(f"{base}/status")["tokens_observed"] > 0
    assert call(f"{candidate}/status")["tokens_observed"] == 0
    assert list(statistics.glob("*.safetensors"))


def test_the_alert_of_a_dead_server_watches_both(scraped: Service) -> None:
    (rule,) = [each for group in _groups(scraped) for each in group["rules"] if each["name"] == "ReapServerDown"]
    assert value(scraped, rule["query"]) == {}
    assert len(value(scraped, rule["query"].replace("== 0", "== 1"))) == 2
