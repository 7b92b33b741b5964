"""Gates: what their expressions mean, and which are refused before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_report import full_report, small_report
from stub_endpoint import StubEndpoint, bigram_model
from typer.testing import CliRunner

from reap_serve.cli.app import app
from reap_serve.compare.thresholds import failures, parse_thresholds, require_passed
from reap_serve.errors import RequestError, ThresholdError

SLICES = {"code", "code.v2", "prose"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slices.code.quality.kl_divergence_mean", "is not PATH>NUMBER"),
        ("slices.code.quality.kl_divergence_mean==1", "is not PATH>NUMBER"),
        ("slices.code.quality.kl_divergence_mean>much", "is not PATH>NUMBER"),
        ("slices.code.quality.kl_divergence_mean>1e", "is no number"),
        (
            "slices.german.quality.kl_divergence_mean>1",
            "names no slice of the traffic; slices are code, code.v2, prose",
        ),
        ("slices.code.quality.kl_divergance>1", "quality has no kl_divergance"),
        ("slices.code.quality>1", "names no number"),
        ("slices.code.quality.tokens.more>1", "nothing below slices.*.quality.tokens"),
        ("base>1", "names no number"),
        ("latency.base.latency.ttft.p95>1", "has no p95"),
    ],
)
def test_wrong_expressions_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("*", r"\*")):
        parse_thresholds([text], SLICES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slices.code.quality.kl_divergence_mean>0.3", ["slices.code.quality.kl_divergence_mean is 0.4 ("]),
        ("slices.code.quality.kl_divergence_mean > 0.4", []),
        ("slices.code.quality.kl_divergence_mean>=4e-1", ["slices.code.quality.kl_divergence_mean is 0.4 ("]),
        ("slices.code.quality.same_top_token_fraction<0.9", ["slices.code.quality.same_top_token_fraction is 0.8 ("]),
        ("slices.code.quality.intervals.kl_divergence_mean.low>0.31", []),
        ("slices.code.quality.intervals.kl_divergence_mean.high>0.3", ["kl_divergence_mean.high is 0.5 ("]),
        ("slices.code.quality.json_valid_fraction_candidate<0.5", ["json_valid_fraction_candidate was not measured ("]),
        ("slices.code.noise_floor.kl_divergence_mean>0.001", ["noise_floor.kl_divergence_mean is 0.002 ("]),
        ("slices.*.quality.tokens>10", ["slices.code.quality.tokens is 100 (", "slices.prose.quality.tokens is 100 ("]),
        ("memory.candidate.weights_bytes>1000", []),
        ("latency.candidate.latency.ttft.p99>0.1", ["latency.candidate.latency.ttft.p99 is 0.2 ("]),
        ("memory.candidate.peak_resident_bytes>1", ["memory.candidate.peak_resident_bytes was not measured ("]),
    ],
)
def test_gates(text: str, expected: list[str]) -> None:
    report = small_report()
    found = failures(parse_thresholds([text], report.slices), report)
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line
        assert f"({text})" in line


def test_gates_on_tasks() -> None:
    report = full_report()
    texts = ["tasks.gsm8k.recovery_percent<98", "tasks.gsm8k.recovery_interval.low<91", "tasks.*.candidate<0.9"]
    found = failures(parse_thresholds(texts, report.slices), report)
    assert [line.partition(" is ")[0] for line in found] == [
        "tasks.gsm8k (exact_match,strict-match) recovery_percent",
        "tasks.gsm8k (exact_match,strict-match) recovery_interval.low",
        "tasks.gsm8k (exact_match,strict-match) candidate",
    ]
    missing = failures(
        parse_thresholds(["tasks.mmlu.recovery_percent<98", "tasks.wikitext.recovery_percent<1"], ()), report
    )
    assert [line.partition(" (tasks")[0] for line in missing] == [
        "tasks.mmlu.recovery_percent was not measured",
        "tasks.wikitext (word_perplexity,none) recovery_percent was not measured",
    ]
    for text in ("tasks.gsm8k<1", "tasks.gsm8k.speed<1", "tasks.gsm8k.method<1"):
        with pytest.raises(RequestError, match="--fail-if"):
            parse_thresholds([text], ())


def test_a_slice_whose_name_holds_a_dot() -> None:
    gates = parse_thresholds(["slices.code.v2.quality.tokens>1"], SLICES)
    assert (gates[0].slice, gates[0].keys) == ("code.v2", ("quality", "tokens"))


def test_all_failures_are_told_at_once() -> None:
    report = small_report()
    gates = parse_thresholds(["slices.code.quality.tokens>1", "slices.prose.quality.tokens>1"], report.slices)
    with pytest.raises(ThresholdError, match="2 of the --fail-if conditions hold") as caught:
        require_passed(gates, report)
    assert caught.value.exit_code == 1
    require_passed(parse_thresholds(["slices.code.quality.tokens>1000"], report.slices), report)


def test_a_wrong_gate_stops_the_command_before_anything_is_started(tmp_path: Path) -> None:
    traffic = tmp_path / "t.jsonl"
    traffic.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    # Port 9 answers nobody: were it asked, the exit code would be 1.
    command = ["compare", "http://127.0.0.1:9", "http://127.0.0.1:9", str(traffic), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "reap_serve", *command, "--fail-if", "slices.default.quality.nonsense>1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --fail-if")
    assert not (tmp_path / "out").exists()


def test_a_gate_that_holds_exits_1_after_the_report_is_written(tmp_path: Path) -> None:
    traffic, output = tmp_path / "t.jsonl", tmp_path / "out"
    body = {"messages": [{"role": "user", "content": "hi"}]}
    traffic.write_text("".join(json.dumps(body | {"seed": number}) + "\n" for number in range(3)))
    with StubEndpoint(bigram_model(1)) as base, StubEndpoint(bigram_model(1, noise=1.0)) as candidate:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "reap_serve", "compare", base.url, candidate.url, str(traffic)),
                *("--output", str(output), "--json", "--latency-requests", "0"),
                *("--fail-if", "slices.default.quality.kl_divergence_mean>0.05"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((output / "report.json").read_text())
    assert result["slices"]["default"]["quality"]["kl_divergence_mean"] > 0.05
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 1 of the --fail-if conditions hold: slices.default.quality.kl_divergence_mean is ")


@pytest.mark.parametrize("text", ["0", "1,x", "", "-1", "1,,2"])
def test_concurrency_must_be_numbers(text: str, tmp_path: Path) -> None:
    import reap_serve.cli.compare  # noqa: F401

    traffic = tmp_path / "t.jsonl"
    traffic.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    url = "http://127.0.0.1:9"
    result = CliRunner().invoke(
        app, ["compare", url, url, str(traffic), "-o", str(tmp_path / "o"), "--concurrency", text]
    )
    assert isinstance(result.exception, RequestError)
    assert "--concurrency" in str(result.exception)
