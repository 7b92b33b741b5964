"""The command's own decisions: what stands for what, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stub_endpoint import StubEndpoint, bigram_model
from typer.testing import CliRunner

from reap_serve.cli.app import app
from reap_serve.cli.compare import compare
from reap_serve.errors import ReapServeError

assert compare is not None


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    path = tmp_path / "traffic.jsonl"
    body = {"messages": [{"role": "user", "content": "question"}], "metadata": {"reap_slice": "prose"}}
    path.write_text("".join(json.dumps(body | {"seed": number}) + "\n" for number in range(4)))
    return path


def refusal(*words: object) -> str:
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert isinstance(result.exception, ReapServeError), result.output
    assert result.exception.exit_code == 2
    return str(result.exception)


def test_what_contradicts_itself_is_refused(traffic: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    for words, message in (
        ((), "no candidate was given; name a model behind the base, or plans by --sweep"),
        (("http://b",), "no traffic was given"),
        (("http://b", traffic, "--same-memory", "1GiB", "--same-kv-cache", "1GiB"), "contradict each other"),
        (("http://b", traffic, "--same-memory", "much"), "much is no size"),
        (("http://b", traffic, "--sweep", "p.json", "--same-memory", "1GiB"), "--sweep measures the quality of plans"),
        (("http://b", traffic, "--task-results", "a.json"), "is not BASE=CANDIDATE"),
        (("http://b", traffic, "--tasks", "gsm8k"), "is not TOOL:TASK"),
    ):
        assert message in refusal("http://a", *words, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--no-skip-malformed",), ("--skip-malformed", "--no-skip-malformed")])
def test_a_malformed_line_ends_it_by_default(traffic: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    traffic.write_text(traffic.read_text() + "{broken\n")
    message = refusal("http://a", "http://b", traffic, *options, "-o", tmp_path / "out")
    assert "traffic.jsonl:5: " in message


def test_with_plans_the_second_word_is_traffic(traffic: Path, tmp_path: Path) -> None:
    plan = tmp_path / "two.json"
    layer = {"layer": "l", "index": 0, "kept": [0, 1], "dropped": [2, 3]}
    plan.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": [layer]}))
    with StubEndpoint(bigram_model(1), masks={(0, 1): bigram_model(1, noise=0.5)}) as endpoint:
        words = [endpoint.url, str(traffic), "--sweep", str(plan), "-o", str(tmp_path / "out"), "--json"]
        result = CliRunner().invoke(app, ["compare", *words, "--answers-per-slice", "1"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["candidate"], list(report["slices"])) == ("two", ["prose"])
    assert report["slices"]["prose"]["quality"]["kl_divergence_mean"] > 0.0


def test_results_of_tools_that_ran_elsewhere(traffic: Path, tmp_path: Path) -> None:
    for name, value in (("a", 0.8), ("b", 0.6)):
        metrics = {"acc,none": value, "acc_stderr,none": 0.01}
        (tmp_path / f"results_{name}.json").write_text(json.dumps({"results": {"arc": metrics}}))
    pair = f"{tmp_path / 'results_a.json'}={tmp_path / 'results_b.json'}"
    with StubEndpoint(bigram_model(1)) as base, StubEndpoint(bigram_model(1)) as candidate:
        words = [base.url, candidate.url, str(traffic), "--task-results", pair, "-o", str(tmp_path / "out")]
        result = CliRunner().invoke(app, ["compare", *words, "--latency-requests", "0", "--answers-per-slice", "0"])
    assert result.exit_code == 0, result.output
    (task,) = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]
    assert (task["task"], task["recovery_percent"], task["method"]) == ("arc", pytest.approx(75.0), "standard errors")
    assert "75.0 [72" in result.output
