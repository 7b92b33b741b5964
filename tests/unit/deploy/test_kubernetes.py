"""The manifests: valid by their schemas where these are at hand, consistent, and commands that reap-serve takes.

Deployments, Services and claims are checked by kubernetes-validate where it is installed. Gateway API, KServe, Argo
and the production-stack publish their schemas in their repositories: REAP_SERVE_CRDS names a folder that holds
httproute.yaml, llmisvc.yaml, at.yaml (the CRDs) and ps.schema.json (the chart's values.schema.json). Without it those
files are checked for their references and queries only.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from known_metrics import DEPLOY, exposed, read_by, recorded
from serve_lines import serve_line, settings_in

from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.serve.command import PLUGIN_NAMES

FOLDER = DEPLOY / "kubernetes"
VALUES = {"MODEL": "org/name", "SERVED_NAME": "model"}
CORE = ("Deployment", "Service", "PersistentVolumeClaim", "CronJob")
CRDS = {"HTTPRoute": "httproute.yaml", "LLMInferenceService": "llmisvc.yaml", "AnalysisTemplate": "at.yaml"}

Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    """Every Kubernetes object."""
    files = [path for path in sorted(FOLDER.rglob("*.yaml")) if "values" not in path.name]
    return [each for path in files for each in yaml.safe_load_all(path.read_text()) if each["kind"] != "Kustomization"]


def one(kind: str, name: str) -> Manifest:
    (found,) = [each for each in manifests() if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def test_core_objects_are_valid() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    checked = [each for each in manifests() if each["kind"] in CORE]
    assert {each["kind"] for each in checked} == set(CORE)
    for each in checked:
        validate.validate(each, "1.30", strict=True)


def schema_folder() -> Path:
    folder = os.environ.get("REAP_SERVE_CRDS")
    if folder is None:
        pytest.skip("REAP_SERVE_CRDS is not set")
    return Path(folder)


@pytest.mark.parametrize("kind", CRDS)
def test_custom_objects_are_valid(kind: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    definition = yaml.safe_load((schema_folder() / CRDS[kind]).read_text())
    schemas = {each["name"]: _closed(each["schema"]["openAPIV3Schema"]) for each in definition["spec"]["versions"]}
    found = [each for each in manifests() if each["kind"] == kind]
    assert found
    for each in found:
        group, _, version = each["apiVersion"].partition("/")
        assert group == definition["spec"]["group"]
        jsonschema.validate(each, schemas[version])


def test_the_charts_values_are_valid() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = _closed(json.loads((schema_folder() / "ps.schema.json").read_text()))
    values = yaml.safe_load((FOLDER / "production-stack-values.yaml").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(values)] == []
    assert not validator.is_valid({**values, "servingEngineSpecs": {}}), "a misspelt key must show"


@pytest.mark.parametrize("overlay", ["base", "canary"])
def test_kubectl_builds_the_overlay(overlay: str) -> None:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    command = [program, "kustomize", str(FOLDER / overlay)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    built = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(run.stdout)}
    assert all(each["metadata"]["namespace"] == "inference" for each in built.values())
    weights = [each["weight"] for each in built["HTTPRoute", "llm"]["spec"]["rules"][0]["backendRefs"]]
    assert weights == {"base": [100], "canary": [90, 10]}[overlay]
    assert (("Deployment", "vllm-candidate") in built) == (overlay == "canary")


def _closed(schema: Any) -> Any:
    """The schema with unknown keys refused, as an API server with strict field validation does."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not open_ended:
        if set(schema["properties"]) >= {"apiVersion", "kind", "metadata"}:
            closed["properties"]["metadata"] = {"type": "object"}
        closed["additionalProperties"] = False
    return closed


def test_kustomizations_name_files_that_exist() -> None:
    for path in FOLDER.rglob("kustomization.yaml"):
        document = yaml.safe_load(path.read_text())
        resources = [path.parent / each for each in document["resources"]]
        assert all(each.exists() for each in resources)
        listed = {each.name for each in resources}
        assert {each.name for each in path.parent.glob("*.yaml")} - {path.name} <= listed


@pytest.mark.parametrize(("name", "records"), [("reap-observer", True), ("vllm-candidate", False)])
def test_containers_start_what_they_say(name: str, records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    pod = one("Deployment", name)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    line = serve_line(container["args"], VALUES, monkeypatch)
    assert line.settings.recording == records
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    if records:
        assert mounts[str(line.settings.directory)] == "statistics"
        assert "--no-enable-prefix-caching" in line.vllm
    assert set(mounts.values()) == {each["name"] for each in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("name", ["reap-observer", "vllm-candidate"])
def test_services_select_their_pods_and_ports(name: str) -> None:
    template = one("Deployment", name)["spec"]["template"]
    service = one("Service", name)["spec"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    (port,) = template["spec"]["containers"][0]["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]


def test_the_route_mirrors_to_the_observer_and_serves_from_production() -> None:
    (rule,) = one("HTTPRoute", "llm")["spec"]["rules"]
    (mirror,) = [each["requestMirror"] for each in rule["filters"] if each["type"] == "RequestMirror"]
    observer = one("Service", mirror["backendRef"]["name"])
    assert mirror["backendRef"]["port"] == observer["spec"]["ports"][0]["port"]
    assert observer["metadata"]["name"] not in {each["name"] for each in rule["backendRefs"]}


def test_the_canary_patches_what_is_there() -> None:
    document = yaml.safe_load((FOLDER / "canary/kustomization.yaml").read_text())
    (patch,) = document["patches"]
    (operation,) = yaml.safe_load(patch["patch"])
    target: Any = one(patch["target"]["kind"], patch["target"]["name"])
    for step in operation["path"].strip("/").split("/"):
        target = target[int(step)] if step.isdigit() else target[step]
    before = {each["name"] for each in target}
    after = {each["name"]: each["weight"] for each in operation["value"]}
    assert before < set(after)
    assert sum(after.values()) == 100
    one("Service", (set(after) - before).pop())


def test_roles_reach_prometheus() -> None:
    (endpoint,) = one("PodMonitor", "reap-serve")["spec"]["podMetricsEndpoints"]
    (relabeling,) = endpoint["relabelings"]
    assert relabeling["targetLabel"] == "role"
    roles = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]["reap-serve/role"]
        for each in manifests()
        if each["kind"] == "Deployment"
    }
    assert roles == {"reap-observer": "observer", "vllm-candidate": "candidate"}


def test_the_analysis_reads_series_that_exist() -> None:
    pytest.importorskip("vllm")
    metrics = one("AnalysisTemplate", "pruned-against-base")["spec"]["metrics"]
    assert len(metrics) >= 5
    for metric in metrics:
        query = metric["provider"]["prometheus"]["query"]
        assert read_by(query)
        assert read_by(query) <= exposed() | recorded()


def test_the_pair_shares_name_and_group() -> None:
    pair = [each["spec"] for each in manifests() if each["kind"] == "LLMInferenceService"]
    assert len(pair) == 2
    assert len({(each["model"]["name"], each["router"]["route"]["group"]) for each in pair}) == 1
    assert [each["router"]["route"]["weight"] for each in pair] == [9, 1]
    for each in pair:
        environment = _environment(each["template"]["containers"][0]["env"])
        arguments = dict(word.split("=", 1) for word in shlex.split(environment["VLLM_ADDITIONAL_ARGS"], posix=False))
        assert arguments["--worker-extension-cls"] == WORKER_EXTENSION
        settings_in(arguments["--additional-config"])
        assert set(PLUGIN_NAMES) <= set(environment["VLLM_PLUGINS"].split(","))


def test_the_chart_gets_what_reap_serve_would_add() -> None:
    values = yaml.safe_load((FOLDER / "production-stack-values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    arguments = model["vllmConfig"]["extraArgs"]
    assert arguments[arguments.index("--worker-extension-cls") + 1] == WORKER_EXTENSION
    settings = settings_in(arguments[arguments.index("--additional-config") + 1])
    assert settings.directory in {each["mountPath"] for each in model["extraVolumeMounts"]}
    assert set(PLUGIN_NAMES) <= set(_environment(model["env"])["VLLM_PLUGINS"].split(","))


def _environment(entries: list[Mapping[str, str]]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in entries}
