"""The README's own loop, command by command, on a checkpoint that transformers makes here and nobody has seen."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from reap_serve.demo.run import demo_files

pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCK = next(
    block for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if "reap-serve observe MODEL" in block
)
LINES = [shlex.split(line, comments=True) for line in BLOCK.splitlines()]
# A small machine and a small model: nothing that the README has to say.
SMALL = ("--enforce-eager", "--max-model-len", "512")


def test_the_block_is_the_loop() -> None:
    assert [line[1] for line in LINES] == ["observe", "stats", "plan", "prune", "verify", "compare", "serve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a model of their own, what they logged, and what they kept aside."""
    import torch
    import transformers

    made = tmp_path_factory.mktemp("own")
    torch.manual_seed(1)
    files = demo_files()
    config = transformers.Qwen3MoeConfig(
        vocab_size=json.loads((files.model / "config.json").read_text())["vocab_size"],
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(made / "MODEL")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (files.model / name).is_file():
            shutil.copy(files.model / name, made / "MODEL")
    for name, source, count in (
        ("traffic.jsonl", files.calibration("code"), 24),
        ("heldout.jsonl", files.heldout("code"), 8),
    ):
        lines = [line for line in source.read_text().splitlines() if len(line) < 1200]
        (made / name).write_text("\n".join(lines[:count]) + "\n")
    return made


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def test_a_newcomer_gets_from_a_model_to_a_served_and_compared_one(folder: Path) -> None:
    for line in LINES[:-1]:
        further = ["--server-args", shlex.join(SMALL), "--answers-per-slice", "2", "--latency-requests", "4"]
        command = [sys.executable, "-m", "reap_serve", *line[1:], *(further if line[1] == "compare" else [])]
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(line)}\n{done.stderr[-3000:]}"
        if line[1] == "verify":
            assert "sound" in done.stdout
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["slices"]["code"]["quality"]["perplexity_ratio"] > 0
    assert (folder / "report" / "report.html").is_file()
    config = json.loads((folder / "MODEL-pruned" / "config.json").read_text())
    # transformers writes either name.
    assert config.get("num_experts", config.get("num_local_experts")) == 6
    assert _answer(folder)


def _answer(folder: Path) -> str:
    """What the last command serves, asked as an application asks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "reap_serve", *LINES[-1][1:], *SMALL, "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    try:
        body = {"model": "MODEL-pruned", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(600):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return str(json.load(response)["choices"][0]["finish_reason"])
            except OSError:
                time.sleep(1)
        raise AssertionError("the server did not answer")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
