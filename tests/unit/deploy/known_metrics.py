"""Names of the series that a server's /metrics has, and of those that a PromQL query reads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import yaml

from reap_serve.cycle.metrics import SERIES
from reap_serve.monitor.metrics import TABLE

DEPLOY = Path(__file__).parents[3] / "deploy"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
KEYWORDS = {"and", "or", "unless", "by", "on", "ignoring", "group_left", "group_right", "without", "bool", "offset"}


def exposed() -> set[str]:
    """Series of vLLM, read from the source of its logger, of our server and cycle, and Prometheus' own `up`."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    found = re.findall(r'_(counter|gauge|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert len(found) > 20, "vLLM declares its metrics in another way"
    series = {name + suffix for kind, name in found for suffix in SUFFIXES[kind]}
    series |= {metric.name + SUFFIXES[metric.kind][0] for metric in TABLE}
    return series | set(SERIES) | {"up"}


def rules(file: str) -> list[dict[str, str]]:
    """The rules of a rule file."""
    document = yaml.safe_load((DEPLOY / "prometheus" / file).read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    """Series that the recording rules make."""
    return {rule["record"] for rule in rules("rules.yml")}


def read_by(query: str) -> set[str]:
    """Names of the series that a query reads."""
    bare = re.sub(r"#.*", "", query)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", "", bare)
    names = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?!\w|\s*\()", bare)
    return {name for name in names if name not in KEYWORDS}
