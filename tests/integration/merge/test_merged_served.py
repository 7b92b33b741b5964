"""From traffic to merged checkpoints by the commands; stock vLLM serves them as transformers computes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT = list(range(5, 45))
KEEP = 16
# Prints the log-probabilities of the prompt's tokens but the first; stock: no plugin of this project is loaded.
ASK = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
prompt = json.loads(sys.argv[2])
sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
(result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
print(json.dumps([step[token].logprob for token, step in zip(prompt[1:], result.prompt_logprobs[1:])]))
"""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def run(*arguments: str, plugins: str | None = None) -> str:
    environment = os.environ | ENVIRONMENT | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def reap_serve(*arguments: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(run("-m", "reap_serve", *arguments, "--json"))
    return document


@pytest.fixture(scope="module")
def embedded() -> Path:
    return Path(str(resources.files("reap_serve.demo") / "tiny_moe"))


@pytest.fixture(scope="module")
def stats(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Statistics with the optional sums over some of the embedded traffic."""
    folder = tmp_path_factory.mktemp("stats")
    for domain in ("code", "tools"):
        lines = (embedded / "traffic" / f"{domain}.calibration.jsonl").read_text().splitlines()[:12]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    output = str(folder / "stats.safetensors")
    traffic = [str(folder / "code.jsonl"), str(folder / "tools.jsonl")]
    extra = ["--extra-sum", "output_sum", "--extra-sum", "logit_gram"]
    reap_serve("observe", str(embedded / "model"), *traffic, "--output", output, "--max-model-len", "1024", *extra)
    return output


@pytest.mark.parametrize("method", ["m-smoe", "hc-smoe", "ream"])
def test_stock_vllm_serves_what_transformers_computes(method: str, embedded: Path, stats: str, tmp_path: Path) -> None:
    merged = tmp_path / method
    arguments = [str(embedded / "model"), stats, "--keep-experts", str(KEEP), "--method", method]
    document = reap_serve("merge", *arguments, "--output", str(merged))
    assert (document["experts_before"], document["experts_after"]) == (32, KEEP)
    assert reap_serve("verify", str(merged))["sound"] is True
    served = torch.tensor(json.loads(run("-c", ASK, str(merged), json.dumps(PROMPT), plugins="")))
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        log_p = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = log_p[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)
