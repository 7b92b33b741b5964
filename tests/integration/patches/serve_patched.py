"""Loads checkpoints into vLLM as it stands on PYTHONPATH, eager and in float32, and prints a line of JSON for each.

Run as a process of its own, with `{"prompt": [ids], "jobs": [{"name", "path", "options"}]}` as its argument. A line
holds `name`, `vllm` (the file of the package), and either the log-probabilities of the prompt's tokens or `error`.
"""

from __future__ import annotations

import gc
import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1"
)

import vllm
from vllm.distributed import cleanup_dist_env_and_memory


def logprobs(path: str, prompt: list[int], options: dict[str, str]) -> list[float]:
    """One engine: the log-probability of each of the prompt's tokens but the first."""
    llm = vllm.LLM(
        model=path,
        dtype="float32",
        enforce_eager=True,
        **options,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
    )
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    try:
        (result,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return [position[token].logprob for token, position in zip(prompt[1:], result.prompt_logprobs[1:], strict=True)]


request = json.loads(sys.argv[1])
for job in request["jobs"]:
    line: dict[str, object] = {"name": job["name"], "vllm": vllm.__file__}
    try:
        line["logprobs"] = logprobs(job["path"], request["prompt"], job["options"])
    except Exception as failure:  # noqa: BLE001 - one family's failure must not hide the others
        line["error"] = repr(failure)[:500]
    gc.collect()
    cleanup_dist_env_and_memory()
    print(json.dumps(line), flush=True)
