"""The command with all that a served model can be asked: memory, `vllm bench serve`, lm-eval; and a sweep of plans.

Five servers are started: minutes on two cores. What lm-eval measures is tested where it is installed; it may have an
environment of its own, whose programs are on PATH.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from damaged_models import damaged, permute_router

EMBEDDED = Path(str(resources.files("reap_serve"))) / "demo" / "tiny_moe"
SERVER_ARGUMENTS = "--enforce-eager --max-model-len 1024 --enable-tokenizer-info-endpoint"
SAME_MEMORY = 300_000_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (EMBEDDED / "model" / "config.json").is_file(), reason="the embedded model is not installed"
    ),
]

CHOICE = """
task: reap_sums_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
CHAT = """
task: reap_sums_chat
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 96, do_sample: false, until: ["<|im_end|>"]}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(folder: Path) -> Path:
    """Two tasks of sums for lm-eval, from held-out requests: the right answer among three, and free answers."""
    folder.mkdir()
    rows = []
    for line in (EMBEDDED / "traffic" / "arithmetic.heldout.jsonl").read_text().splitlines()[:40]:
        record = json.loads(line)
        question = record["body"]["messages"][0]["content"]
        answer = record["response"]["body"]["choices"][0]["message"]["content"]
        head, _, number = answer.rpartition(" ")
        rows.append(
            {
                "question": question,
                "answer": answer,
                "prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{head} ",
                "choices": [number, str(int(number) + 1), str(int(number) + 10)],
            }
        )
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "chat.yaml").write_text(CHAT.format(data=data))
    return folder


def run(*words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "reap_serve", "compare", *map(str, words), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report on a model with a permuted router."""
    root = tmp_path_factory.mktemp("command")
    candidate = damaged(EMBEDDED / "model", root / "permuted", permute_router(1))
    words: list[object] = [EMBEDDED / "model", candidate, EMBEDDED / "traffic" / "arithmetic.heldout.jsonl"]
    words += ["--output", root / "out", "--server-args", SERVER_ARGUMENTS, "--answers-per-slice", 2]
    words += ["--same-memory", SAME_MEMORY, "--load", "vllm-bench", "--latency-requests", 12, "--concurrency", "1,4"]
    words += ["--goodput", "ttft:60000", "--max-answer-tokens", 16]
    if shutil.which("lm_eval"):
        tasks = write_tasks(root / "tasks")
        words += ["--tasks", f"lm-eval:reap_sums_choice --include_path {tasks}"]
        words += ["--tasks", f"lm-eval-chat:reap_sums_chat --include_path {tasks}"]
    report = run(*words)
    assert {path.name for path in (root / "out").iterdir()} >= {"report.json", "report.html", "latency-base-4.json"}
    exported = json.loads((root / "out" / "latency-base-4.json").read_text())
    assert exported["scenario"]["load"]["standardized"]["tool"] == "vllm bench serve"
    return report


def test_vllm_bench_drives_the_load(compared: dict[str, Any]) -> None:
    latency = compared["latency"]
    assert latency["driver"] == "vllm-bench"
    assert [level["concurrency"] for level in latency["levels"]] == [1, 4]
    for level in latency["levels"]:
        for side in ("base", "candidate"):
            assert (level[side]["requests"], level[side]["failed"]) == (12, 0)
            assert level[side]["goodput_requests_per_second"] == pytest.approx(12 / level[side]["seconds"])
            times = level[side]["latency"]
            assert 0.0 < times["ttft"]["p50"] <= times["ttft"]["p99"] <= times["e2e"]["p99"]
            assert 0.0 < times["tpot"]["p50"] <= times["tpot"]["p90"]


def test_the_same_memory_for_both(compared: dict[str, Any]) -> None:
    memory = compared["memory"]
    assert memory["budget"] == {"same": "memory", "size_bytes": SAME_MEMORY}
    for side in ("base", "candidate"):
        assert memory[side]["weights_bytes"] + memory[side]["kv_cache_bytes"] == SAME_MEMORY
        # 4 layers x keys and values x 2 heads x 32 x 2 bytes = 1024 bytes a token; less by up to a block of 128.
        assert 0 <= memory[side]["kv_cache_bytes"] // 1024 - memory[side]["kv_cache_tokens"] < 256
        assert memory[side]["resident_bytes"] <= memory[side]["peak_resident_bytes"]


@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_measures_both(compared: dict[str, Any]) -> None:
    tasks = {(task["task"], task["metric"]): task for task in compared["tasks"]}
    choice, chat = tasks["reap_sums_choice", "acc,none"], tasks["reap_sums_chat", "exact_match,none"]
    for task in (choice, chat):
        print(f"{task['task']}: {task['base']} -> {task['candidate']}, {task['recovery_interval']}")
        assert (task["tool"], task["items"], task["method"]) == ("lm-eval", 40, "pairs")
        # The embedded model is right on 119 of 120 sums.
        assert task["base"] > 0.9
        low, high = task["recovery_interval"]
        assert low <= task["recovery_percent"] <= high <= 100.0
    # One whose router is permuted still tells the right answer among three, but seldom finds it.
    assert chat["recovery_percent"] < choice["recovery_percent"]


def test_a_sweep_finds_what_the_pruned_checkpoint_shows(tmp_path: Path) -> None:
    traffic = EMBEDDED / "traffic" / "code.heldout.jsonl"
    plans = {}
    for name, step in (("half", 2), ("quarter", 4)):
        layers = [
            {
                "layer": f"model.layers.{index}.mlp.experts",
                "index": index,
                "kept": [expert for expert in range(32) if expert % step == 0],
                "dropped": [expert for expert in range(32) if expert % step],
            }
            for index in range(4)
        ]
        plans[name] = tmp_path / f"{name}.json"
        plans[name].write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": layers}))
    pruned = tmp_path / "pruned"
    prune = [sys.executable, "-m", "reap_serve", "prune", str(EMBEDDED / "model"), str(plans["half"]), str(pruned)]
    subprocess.run(prune, check=True, capture_output=True)
    common = (traffic, "--answers-per-slice", 4, "--latency-requests", 0, "--server-args", SERVER_ARGUMENTS)
    swept = run(
        EMBEDDED / "model", *common, "--sweep", plans["half"], "--sweep", plans["quarter"], "-o", tmp_path / "swept"
    )
    served = run(EMBEDDED / "model", pruned, *common, "-o", tmp_path / "served")
    masked, checkpoint = (report["slices"]["code"]["quality"] for report in (swept, served))
    noise = served["slices"]["code"]["noise_floor"]
    print(
        f"KL {masked['kl_divergence_mean']:.5f} masked, {checkpoint['kl_divergence_mean']:.5f} served, noise floor "
        f"{noise['kl_divergence_mean']:.1e}"
    )
    # bf16 sums of other batches apart, a mask is the checkpoint.
    assert masked["kl_divergence_mean"] == pytest.approx(checkpoint["kl_divergence_mean"], rel=0.01)
    assert masked["perplexity_candidate"] == pytest.approx(checkpoint["perplexity_candidate"], rel=0.01)
    assert [entry["experts_kept"] for entry in swept["candidates"]] == [16, 8]
    half, quarter = swept["candidates"]
    assert 0 <= served["memory"]["candidate"]["weights_bytes"] - half["weights_bytes"] < 100_000
    assert quarter["weights_bytes"] < half["weights_bytes"]
    assert "plot-pareto" in (tmp_path / "swept" / "report.html").read_text()
