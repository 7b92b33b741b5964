"""`reap-serve tune`: what each option asks for, and the document that it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap_serve.cli import app
from reap_serve.plan.limits import ServingTarget
from reap_serve.plan.request import Size
from reap_serve.records import provenance
from reap_serve.tune.record import SCHEMA_VERSION, CandidateResult, Figures, LimitResult, SplitSummary, TuneReport
from reap_serve.tune.request import Budget, TuneRequest

LIMIT = "slices.*.quality.perplexity_ratio<1.05"


def report(plan: str | None) -> TuneReport:
    limits = (LimitResult(limit=LIMIT, value=1.04, held=True, slice="code"),)
    figures = Figures(
        kl_divergence_mean=0.01,
        perplexity_ratio={"code": 1.02},
        kl_divergence={"code": 0.01},
        same_answer_fraction={},
        tool_calls_lost={},
        limits=limits,
    )
    candidate = CandidateResult(
        criterion="reap",
        variant="",
        keep_experts=26,
        part="held-out",
        held=True,
        figures=figures,
        over_reap=None,
        chosen=True,
    )
    return TuneReport(
        schema_version=SCHEMA_VERSION,
        provenance=provenance(),
        model="MODEL",
        plan=plan,
        keep_experts=26 if plan else 32,
        num_experts=32,
        criterion="reap" if plan else None,
        variant="",
        held=plan is not None,
        reason="because" if plan else "nothing can go within the limits",
        limits=limits,
        candidates=(candidate,),
        held_out={},
        next_smaller=None,
        held_out_looks=1,
        split=SplitSummary(seed=0, requests={}, conversations={}, left_out=0),
        trials=(),
        budget="900 s",
        budget_exhausted=False,
        masked_tokens=1,
        tokens=2,
        seconds=3.0,
        notes=(),
    )


@pytest.fixture
def traffic(tmp_path: Path) -> Path:
    path = tmp_path / "code.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    return path


def run(
    monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, plan: str | None = "out/plan.json"
) -> tuple[TuneRequest | None, int]:
    """What reached `tune`, and the exit code."""
    asked: list[TuneRequest] = []

    def tune(request: TuneRequest, say: object) -> TuneReport:
        asked.append(request)
        return report(plan)

    monkeypatch.setattr("reap_serve.tune.run.tune", tune)
    monkeypatch.setattr("sys.argv", ["reap-serve", "tune", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    code = ended.value.code
    return (asked[0] if asked else None), 0 if code is None else int(code)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--limit", "slices.a.quality.loop_fraction_candidate<0.1"], "limits", None),
        (["--keep-fraction", "0.5"], "size", Size(keep_fraction=0.5)),
        (["--keep-experts", "24"], "size", Size(keep_experts=24)),
        (["--stats", "a.stats", "--stats", "b.stats"], "statistics", ("a.stats", "b.stats")),
        (["--budget", "30m"], "budget", Budget(seconds=1800)),
        (["--budget", "none"], "budget", Budget()),
        (["--budget", "500ktokens"], "budget", Budget(masked_tokens=500_000)),
        ([], "budget", Budget(seconds=900)),
        (["--no-trials"], "trials", False),
        ([], "trials", True),
        (["--seed", "7"], "seed", 7),
        (["--tensor-parallel-size", "2"], "target", ServingTarget(tensor_parallel_size=2)),
        (["--expert-parallel-size", "4"], "target", ServingTarget(expert_parallel_size=4)),
        (["--multiple-of", "8"], "target", ServingTarget(multiple_of=8)),
        (["--moe-backend", "triton"], "target", ServingTarget(moe_backend="triton")),
        (["--engine-args", '{"dtype": "float32"}'], "engine_arguments", {"dtype": "float32"}),
        (["--max-answer-tokens", "9"], "max_answer_tokens", 9),
        (["--answers-per-slice", "3"], "answers_per_slice", 3),
        (["--overwrite"], "overwrite", True),
    ],
    ids=str,
)
def test_each_option_reaches_what_it_names(
    options: list[str], field: str, value: Any, traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, code = run(monkeypatch, "MODEL", traffic, "--limit", LIMIT, "-o", tmp_path / "out", *options)
    assert code == 0
    assert request is not None
    assert (request.model, request.output, len(request.requests)) == ("MODEL", tmp_path / "out", 1)
    if field == "limits":
        assert request.limits == (LIMIT, options[1])
    else:
        assert getattr(request, field) == value


def test_a_slice_names_a_file(traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, _ = run(monkeypatch, "MODEL", "--slice", f"chat={traffic}", "--limit", LIMIT, "-o", tmp_path / "out")
    assert request is not None
    assert [entry.slice for entry in request.requests] == ["chat"]


def test_malformed_lines_stop_the_command_or_are_counted(
    traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traffic.write_text(traffic.read_text() + "{\n")
    words = ("MODEL", traffic, "--limit", LIMIT, "-o", tmp_path / "out")
    assert run(monkeypatch, *words) == (None, 2)
    request, code = run(monkeypatch, *words, "--skip-malformed")
    assert request is not None
    assert (len(request.requests), code) == (1, 0)


def test_json_is_the_document_of_the_contract(
    traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "MODEL", traffic, "--limit", LIMIT, "-o", tmp_path / "out", "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["plan"] == "out/plan.json"
    assert (document["keep_experts"], document["criterion"], document["held"]) == (26, "reap", True)
    assert document["limits"] == [{"limit": LIMIT, "value": 1.04, "held": True, "slice": "code"}]
    assert {"criterion", "keep_experts", "figures", "chosen"} <= set(document["candidates"][0])
    assert (document["masked_tokens"], document["seconds"]) == (1, 3.0)


def test_where_nothing_can_go_the_document_is_printed_and_the_exit_code_is_1(
    traffic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("MODEL", traffic, "--limit", LIMIT, "-o", tmp_path / "out", "--json")
    _, code = run(monkeypatch, *words, plan=None)
    printed = capsys.readouterr()
    assert code == 1
    assert json.loads(printed.out)["plan"] is None
    assert "error: nothing can go within the limits" in printed.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither a limit nor a size"),
        (["--keep-fraction", "0.5", "--keep-experts", "9"], "contradict each other"),
        (["--limit", LIMIT, "--budget", "soon"], "is no budget"),
        (["--limit", LIMIT, "--engine-args", "{"], "is not JSON"),
        (["--limit", LIMIT, "--tensor-parallel-size", "0"], "--tensor-parallel-size is 0"),
        (["--limit", LIMIT, "--format", "nonsense"], "nonsense"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    options: list[str],
    message: str,
    traffic: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "MODEL", traffic, "-o", tmp_path / "out", *options) == (None, 2)
    assert message in capsys.readouterr().err
