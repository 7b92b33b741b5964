"""Every route of the runbook is served, every file and alert that it names is there.

Its commands are checked with those of all READMEs.
"""

from __future__ import annotations

import re
import shlex

import pytest
from known_metrics import DEPLOY, exposed, rules

TEXT = (DEPLOY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]


def test_routes_are_served() -> None:
    pytest.importorskip("fastapi")
    from reap_serve.serve.routes import router

    served = {(method, route.path) for route in router.routes for method in getattr(route, "methods", ())}
    named = set(re.findall(r"`(PUT|DELETE) (/v1/reap/\w+)`", TEXT))
    named |= {
        (line[line.index("-X") + 1] if "-X" in line else "GET", "/v1/reap" + line[-1].partition("/v1/reap")[2])
        for line in LINES
        if line[0] == "curl"
    }
    assert len(named) == 4
    for method, path in named:
        assert (method, path) in served or (method, "/v1/reap/{action}") in served


def test_files_and_alerts_are_there() -> None:
    for line in LINES:
        if line[:2] == ["kubectl", "apply"]:
            assert (DEPLOY.parent / line[-1] / "kustomization.yaml").is_file()
    alerts = [rule["alert"] for rule in rules("alerts.yml")]
    for name in re.findall(r"`(Reap\w+)\*?`", TEXT):
        assert any(alert.startswith(name) for alert in alerts), name


def test_series_exist() -> None:
    pytest.importorskip("vllm")
    assert set(re.findall(r"`(vllm:\w+|reap_serve_\w+)`", TEXT)) <= exposed()
