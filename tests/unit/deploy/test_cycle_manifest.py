"""The nightly cycle's manifests: a configuration that the program reads, over volumes that are there."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from known_metrics import DEPLOY

from reap_serve.cycle.config import read_config
from reap_serve.cycle.limits import parse_limits
from reap_serve.statistics.windows import parse_duration

FOLDER = DEPLOY / "kubernetes" / "cycle"


@pytest.fixture(scope="module")
def job() -> Any:
    (found,) = [each for each in yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text()) if each["kind"] == "CronJob"]
    return found


def test_the_configuration_is_read_and_its_limits_name_figures() -> None:
    config = read_config(FOLDER / "cycle.toml")
    limits = parse_limits(config.gates.trial, {"code"})
    assert len(limits.of_slices) + len(limits.others) == len(config.gates.trial)
    age, since = config.retention.statistics_age, config.statistics.since
    assert age is not None
    assert parse_duration(age) > parse_duration(since)


def test_every_path_of_the_configuration_lies_on_a_mounted_volume(job: Any) -> None:
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    config = read_config(FOLDER / "cycle.toml")
    textfile = config.metrics.textfile
    paths = [str(config.state), str(config.served), *config.statistics.paths, *config.traffic.heldout, str(textfile)]
    for path in paths:
        assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
    assert container["args"][:2] == ["cycle", "/config/cycle.toml"]
    assert pod["securityContext"]["runAsNonRoot"]


def test_a_refusal_is_not_tried_again_and_two_never_run_at_once(job: Any) -> None:
    """Exit 1 is also a decision; a lock keeps a second run waiting for nothing."""
    assert job["spec"]["jobTemplate"]["spec"]["backoffLimit"] == 0
    assert job["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_statistics_are_those_that_the_observer_writes(job: Any) -> None:
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    claims = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["volumes"]}
    observer = next(yaml.safe_load_all((DEPLOY / "kubernetes/base/observer.yaml").read_text()))
    theirs = [each for each in observer["spec"]["template"]["spec"]["volumes"] if each["name"] == "statistics"]
    assert claims["statistics"] == theirs[0]["persistentVolumeClaim"]["claimName"]


def test_the_kustomization_carries_the_configuration() -> None:
    document = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (generator,) = document["configMapGenerator"]
    assert generator["name"] == "reap-cycle"
    assert (FOLDER / generator["files"][0]).is_file()


def test_compose_runs_the_same_configuration() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["cycle"]
    mounts = {each.removesuffix(":ro").rpartition(":")[2]: each for each in service["volumes"]}
    assert service["command"][1] == "/config/cycle.toml"
    assert (DEPLOY / mounts["/config/cycle.toml"].split(":")[0]).resolve() == (FOLDER / "cycle.toml").resolve()
    assert {"/statistics", "/cycle"} <= set(mounts)
