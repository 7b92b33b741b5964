"""Evaluation tools: what they write, what recovery it gives, and how they are run."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from reap_serve.compare.recovery import task_report, task_reports
from reap_serve.compare.task_results import TaskScore, read_task_results
from reap_serve.compare.task_tools import parse_task_runs, run_tasks
from reap_serve.errors import EngineError, InputFileError, RequestError

STAMP = "2026-08-21T10-11-12.131415"


def write_lm_eval(folder: Path, correct: list[int], *, samples: bool = True) -> Path:
    """What `lm_eval run --output_path folder --log_samples` of release 0.4.13 leaves, cut to what is read."""
    folder.mkdir(parents=True)
    value = sum(correct) / len(correct)
    document = {
        "results": {
            "sums": {
                "name": "sums",
                "alias": "sums",
                "sample_len": len(correct),
                "exact_match,strict": value,
                "exact_match_stderr,strict": (value * (1 - value) / (len(correct) - 1)) ** 0.5,
            },
            "wiki": {"alias": "wiki", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
        },
        "higher_is_better": {"sums": {"exact_match": True}, "wiki": {"word_perplexity": False}},
        "n-samples": {"sums": {"original": 500, "effective": len(correct)}},
    }
    (folder / f"results_{STAMP}.json").write_text(json.dumps(document))
    lines = [
        {"doc_id": number, "filter": "strict", "metrics": ["exact_match"], "exact_match": hit, "target": "1"}
        for number, hit in enumerate(correct)
    ]
    if samples:
        (folder / f"samples_sums_{STAMP}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_evalplus(path: Path, base: dict[str, str], plus: dict[str, str]) -> Path:
    """What evalplus.evaluate of release 0.3.1 writes."""
    solutions = {
        task: [
            {
                "task_id": task,
                "solution": "def f(): ...",
                "base_status": status,
                "plus_status": plus[task],
                "base_fail_tests": [],
                "plus_fail_tests": [],
            }
        ]
        for task, status in base.items()
    }
    path.write_text(json.dumps({"date": "2026-11-01 10:00", "hash": "0" * 32, "eval": solutions}))
    return path


def write_bfcl(folder: Path, failed: list[int], total: int) -> Path:
    """What `bfcl evaluate` of release 2026.3.23 writes: a header, then one line for each entry that failed."""
    file = folder / "score" / "model" / "non_live" / "BFCL_v4_simple_python_score.json"
    file.parent.mkdir(parents=True)
    correct = total - len(failed)
    lines: list[dict[str, object]] = [
        {"accuracy": correct / total, "correct_count": correct, "total_count": total},
        *({"id": f"simple_python_{number}", "valid": False, "error": ["wrong name"]} for number in failed),
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lm_eval(tmp_path: Path) -> None:
    sums, wiki = read_task_results(write_lm_eval(tmp_path / "a", [1, 0, 1, 1]))
    assert (sums.tool, sums.task, sums.metric, sums.value, sums.num_items) == (
        "lm-eval",
        "sums",
        "exact_match,strict",
        0.75,
        4,
    )
    assert sums.items == {"0": 1.0, "1": 0.0, "2": 1.0, "3": 1.0}
    assert sums.stderr == pytest.approx(0.25)
    assert (wiki.higher_is_better, wiki.stderr, wiki.items, wiki.num_items) == (False, None, None, None)


def test_evalplus(tmp_path: Path) -> None:
    file = write_evalplus(
        tmp_path / "model_openai_temp_0.0_eval_results.json",
        {"HumanEval/0": "pass", "HumanEval/1": "pass", "HumanEval/2": "fail", "HumanEval/3": "timeout"},
        {"HumanEval/0": "pass", "HumanEval/1": "fail", "HumanEval/2": "pass", "HumanEval/3": "fail"},
    )
    base, plus = read_task_results(file)
    assert (base.task, base.metric, base.value, base.num_items) == ("HumanEval", "pass@1", 0.5, 4)
    # On all tests only what passes the base tests, too.
    assert (plus.metric, plus.value) == ("pass@1 plus", 0.25)
    assert plus.items is not None
    assert plus.items["HumanEval/1"] == 0.0


def test_bfcl_pairs_what_failed_with_what_passed(tmp_path: Path) -> None:
    (base,) = read_task_results(write_bfcl(tmp_path / "base", list(range(20)), 400))
    (candidate,) = read_task_results(write_bfcl(tmp_path / "candidate", list(range(10, 60)), 400))
    assert (base.task, base.metric, base.value) == ("simple_python", "accuracy", 0.95)
    report = task_report(base, candidate)
    assert report.recovery_percent == pytest.approx(100 * 350 / 380)
    assert report.method == "pairs"
    # Of 400 pairs 40 got worse and 10 better: sum of the candidate over sum of the base in each resample.
    values = np.array([[0, 0]] * 10 + [[0, 1]] * 10 + [[1, 0]] * 40 + [[1, 1]] * 340, np.float64)
    drawn = values[np.random.default_rng(0).integers(400, size=(5000, 400))].sum(axis=1)
    low, high = np.quantile(100 * drawn[:, 1] / drawn[:, 0], (0.025, 0.975))
    assert report.recovery_interval == pytest.approx((low, high), abs=0.5)


def test_pairs_are_narrower_than_standard_errors(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    base = (generator.random(200) < 0.8).astype(int).tolist()
    candidate = [hit if number % 10 else 0 for number, hit in enumerate(base)]
    one, other = write_lm_eval(tmp_path / "a", base), write_lm_eval(tmp_path / "b", candidate)
    paired = task_reports(read_task_results(one), read_task_results(other))[0]
    bare = [write_lm_eval(tmp_path / name, hits, samples=False) for name, hits in (("c", base), ("d", candidate))]
    unpaired = task_reports(read_task_results(bare[0]), read_task_results(bare[1]))[0]
    assert (paired.method, unpaired.method) == ("pairs", "standard errors")
    assert paired.recovery_percent == unpaired.recovery_percent == pytest.approx(100 * sum(candidate) / sum(base))
    assert paired.recovery_interval is not None
    assert unpaired.recovery_interval is not None
    assert unpaired.recovery_interval[0] < paired.recovery_interval[0] < paired.recovery_percent  # type: ignore[operator]
    assert paired.recovery_interval[1] < unpaired.recovery_interval[1]


def score(value: float, stderr: float | None, *, higher: bool = True) -> TaskScore:
    return TaskScore("lm-eval", "t", "acc,none", value, 100, stderr, None, higher)


def test_fiellers_interval() -> None:
    report = task_report(score(0.8, 0.04), score(0.6, 0.05))
    # g = (1.96 * 0.04 / 0.8)^2 = 0.009604; r = 0.75
    # (0.75 -+ 2.45 sqrt(0.0025 * 0.990396 + 0.5625 * 0.0016)) / 0.990396 = (0.75 -+ 0.142350) / 0.990396
    assert report.recovery_interval == pytest.approx((61.354, 90.102), abs=0.02)
    # Neither of the base's scores is sure to differ from 0.
    assert task_report(score(0.05, 0.04), score(0.05, 0.04)).recovery_interval is None


def test_no_recovery_where_there_is_none() -> None:
    for base in (score(0.0, 0.0), score(12.0, 1.0, higher=False)):
        report = task_report(base, score(6.0, 1.0))
        assert (report.recovery_percent, report.recovery_interval, report.method) == (None, None, None)
    assert task_report(score(0.5, None), score(0.5, None)).recovery_interval is None
    assert task_reports([score(0.5, None)], []) == ()


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="holds no result"):
        read_task_results(tmp_path)
    broken = tmp_path / "results_1.json"
    for text in ('{"results": 3}', '{"results": {"t": {"acc,none": 1}}, "n-samples": {"t": {"effective": []}}}'):
        broken.write_text(text)
        with pytest.raises(InputFileError, match="not of the form"):
            read_task_results(broken)
    broken.write_text("{")
    with pytest.raises(InputFileError, match="is not JSON"):
        read_task_results(broken)


FAKE_LM_EVAL = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
said = dict(zip(words, words[1:]))
model = dict(pair.split("=", 1) for pair in said["--model_args"].split(","))
folder = pathlib.Path(said["--output_path"]) / "m"
folder.mkdir()
assert os.environ["OPENAI_API_KEY"] == "sk-1", "no key"
if "--limit" not in said:
    sys.exit("ValueError: no limit")
value = {{"http://one/v1/completions": 0.5, "http://two/v1/chat/completions": 0.25}}[model["base_url"]]
results = {{task: {{"acc,none": value}} for task in said["--tasks"].split(",")}}
(folder / "results_1.json").write_text(json.dumps({{"results": results}}))
"""


def install(folder: Path, name: str, text: str) -> None:
    program = folder / name
    program.write_text(text.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_a_tool_is_run_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RequestError, match=r"lm_eval is not installed; pip install 'lm-eval\[api\]'"):
        parse_task_runs(["lm-eval:gsm8k"])
    install(tmp_path, "lm_eval", FAKE_LM_EVAL)
    runs = parse_task_runs(["lm-eval:a,b --limit 10", "lm-eval-chat:c --limit 10"])
    found = run_tasks(runs[:1], "http://one", "m", "sk-1") + run_tasks(runs[1:], "http://two", "m", "sk-1")
    assert [(score.task, score.value) for score in found] == [("a", 0.5), ("b", 0.5), ("c", 0.25)]
    with pytest.raises(EngineError, match="lm_eval stopped: ValueError: no limit"):
        run_tasks(parse_task_runs(["lm-eval:a"]), "http://one", "m", "sk-1")


FAKE_BFCL = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
said = dict(zip(words, words[1:]))
assert os.environ["REMOTE_OPENAI_BASE_URL"] == "http://one/v1"
result = pathlib.Path(said["--result-dir"])
assert pathlib.Path(os.environ["BFCL_PROJECT_ROOT"]) == result.parent
assert pathlib.Path(said.get("--local-model-path", ".")).is_dir()
if words[0] == "generate":
    assert "--run-ids" in words and "--num-threads" in words and said["--local-model-path"] == "m"
    result.mkdir()
    (result / "answers").write_text(said["--model"])
else:
    assert words[-3:] == ["--model", "Qwen", "--partial-eval"], words
    folder = pathlib.Path(said["--score-dir"]) / (result / "answers").read_text()
    folder.mkdir(parents=True)
    header = {{"accuracy": 1.0, "correct_count": 2, "total_count": 2}}
    (folder / f"BFCL_v4_{{said['--test-category']}}_score.json").write_text(json.dumps(header))
"""
FAKE_EVALPLUS = """#!{python}
import json, pathlib, sys
words = sys.argv[1:]
said = dict(zip(words, words[1:]))
folder = pathlib.Path(said["--root"]) / said["--dataset"]
folder.mkdir()
solution = {{"task_id": "Mbpp/2", "solution": "", "base_status": "pass", "plus_status": None}}
assert said["--base-url"] == "http://one/v1"
(folder / "m_eval_results.json").write_text(json.dumps({{"eval": {{"Mbpp/2": [solution]}}}}))
"""


def test_bfcl_answers_first_and_scores_then_and_evalplus_does_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    install(tmp_path, "bfcl", FAKE_BFCL)
    install(tmp_path, "evalplus.evaluate", FAKE_EVALPLUS)
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    runs = parse_task_runs(["bfcl:simple_python --model Qwen --num-threads 2 --run-ids", "evalplus:mbpp"])
    # The model's path is one from here.
    found = run_tasks(runs, "http://one", "m", None)
    assert [(score.task, score.metric, score.value) for score in found] == [
        ("simple_python", "accuracy", 1.0),
        ("Mbpp", "pass@1", 1.0),
    ]


def test_wrong_runs_are_refused() -> None:
    for text in ("", "gsm8k", "lm-eval", "lm-eval:", "lm-eval:a,,b", "swebench:x"):
        with pytest.raises(RequestError, match="is not TOOL:TASK"):
            parse_task_runs([text])
