"""Rules and alerts are valid, do what they say, and read series that exist."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import yaml
from known_metrics import DEPLOY, exposed, read_by, recorded, rules

FOLDER = DEPLOY / "prometheus"


def promtool(*arguments: str) -> str:
    """What promtool prints, run in the folder of the rules; it must succeed."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    run = subprocess.run([program, *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_promtool_accepts_the_configuration() -> None:
    assert "prometheus.yml is valid prometheus config file" in promtool("check", "config", "prometheus.yml")
    checked = promtool("check", "rules", "rules.yml", "alerts.yml")
    for file in ("rules.yml", "alerts.yml"):
        assert f"{len(rules(file))} rules found" in checked


def test_promtool_passes_the_rules_own_tests() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules.test.yml")


def test_every_alert_is_shown_to_fire_and_not_to_fire() -> None:
    document = yaml.safe_load((FOLDER / "rules.test.yml").read_text())
    cases = [case for test in document["tests"] for case in test.get("alert_rule_test", [])]
    for name in (rule["alert"] for rule in rules("alerts.yml")):
        outcomes = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert outcomes == {True, False}, name


def test_every_recording_rule_is_tested() -> None:
    document = yaml.safe_load((FOLDER / "rules.test.yml").read_text())
    tested = {
        name
        for test in document["tests"]
        for case in test.get("promql_expr_test", [])
        for name in read_by(case["expr"])
    }
    assert recorded() <= tested


@pytest.mark.parametrize("file", ["rules.yml", "alerts.yml"])
def test_rules_read_series_that_exist(file: str) -> None:
    pytest.importorskip("vllm")
    known = exposed() | recorded()
    for rule in rules(file):
        assert read_by(rule["expr"])
        assert read_by(rule["expr"]) <= known, rule


def test_the_reader_of_queries_finds_names_only() -> None:
    query = (
        'sum by (role, le) (rate(vllm:a_total{x="vllm:no"}[5m])) / on (role) group_left () (ours > 0.5) and on () b:c'
    )
    assert read_by(query) == {"vllm:a_total", "ours", "b:c"}
