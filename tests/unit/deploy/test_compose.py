"""The services start what they say, and find each other."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from known_metrics import DEPLOY
from serve_lines import serve_line

VALUES = {"MODEL": "org/name", "SERVED_NAME": "model"}


def services() -> dict[str, dict[str, list[str]]]:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    found = document["services"]
    assert isinstance(found, dict)
    return found


def test_the_clients_parser_accepts_it() -> None:
    """`docker compose` or, where it is missing, Compose 1.29; neither needs an engine for this."""
    commands = [command for command in (["docker", "compose"], ["docker-compose"]) if _works(command)]
    if not commands:
        pytest.skip("no Compose client is installed")
    arguments = ["-f", str(DEPLOY / "compose.yaml"), "--profile", "candidate", "config"]
    environment = {**os.environ, "MODEL": "org/name", "GRAFANA_PASSWORD": "secret"}
    run = subprocess.run([*commands[0], *arguments], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert set(yaml.safe_load(run.stdout)["services"]) == set(services())


def _works(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0


def test_base_observes_into_its_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    base = services()["base"]
    line = serve_line(base["command"], VALUES, monkeypatch)
    assert line.settings.recording
    assert line.settings.overhead_budget == 0.02
    assert f"statistics:{line.settings.directory}" in base["volumes"]
    assert "org/name" in line.vllm


def test_the_candidate_records_nothing_and_has_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    found = services()
    line = serve_line(found["candidate"]["command"], VALUES, monkeypatch)
    assert not line.settings.recording
    assert "/models/pruned" in line.vllm
    assert any(each.split("}:")[-1] == "/models/pruned:ro" for each in found["candidate"]["volumes"])
    names = [
        command[command.index("--served-model-name") + 1]
        for command in (found[name]["command"] for name in ("base", "candidate"))
    ]
    assert names[0] == names[1]


def test_prometheus_scrapes_both_by_their_names() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = {config["labels"]["role"]: config["targets"] for job in scrape for config in job["static_configs"]}
    assert targets == {role: [f"{role}:8000"] for role in ("base", "candidate")}
    assert set(targets) <= set(services())


def test_every_mounted_file_is_there() -> None:
    for service in services().values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).exists(), mount


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_pinned() -> None:
    images = [
        service["image"] for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    ]
    assert all(":" in Path(image).name and not image.endswith(":latest") for image in images)
