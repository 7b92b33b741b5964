"""Loads checkpoints into stock vLLM one after the other and prints a line of JSON for each.

Run as a process of its own: `python serve_in_vllm.py '[{"name", "path", "dtype", "attention"}]'`. A line holds `name`,
and either the log-probabilities of the prompt's tokens and two generated tokens, or `error`.
"""

from __future__ import annotations

import gc
import json
import os
import sys

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1"
)

from serve_prompt import PROMPT
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def serve(path: str, dtype: str, attention: str | None) -> dict[str, object]:
    """One engine: the prompt's log-probabilities and what it generates."""
    llm = LLM(
        model=path,
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        # vLLM 0.32's rotary kernel for the CPU reads 3-D queries wrongly; the PyTorch one does not.
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        attention_config={"backend": attention},
    )
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    try:
        (result,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
    found = zip(PROMPT[1:], result.prompt_logprobs[1:], strict=True)
    return {
        "logprobs": [position[token].logprob for token, position in found],
        "generated": list(result.outputs[0].token_ids),
    }


for job in json.loads(sys.argv[1]):
    try:
        line = serve(job["path"], job["dtype"], job["attention"])
    except Exception as failure:  # noqa: BLE001 - one family's failure must not hide the others
        line = {"error": repr(failure)[:500]}
    gc.collect()
    cleanup_dist_env_and_memory()
    print(json.dumps({"name": job["name"], **line}), flush=True)
