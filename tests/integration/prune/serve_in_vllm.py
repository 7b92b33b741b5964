"""Loads checkpoints into stock vLLM one after the other and prints a line of JSON for each.

Run as a process of its own: `python serve_in_vllm.py JOBS`, a JSON list of `{"name", "path", "dtype", "attention",
"masks"}`; each mask is the dropped experts by layer, `{}` for none. A line holds `name`, `seconds`, and either
`answers`, one a mask, with the log-probabilities of the prompt's tokens and two generated tokens, or `error`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Mapping

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1"
)

from mask_in_vllm import masked
from serve_prompt import PROMPT
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def serve(job: Mapping[str, object]) -> list[dict[str, object]]:
    """One engine: the prompt's log-probabilities and what it generates, under each mask."""
    llm = LLM(
        model=job["path"],
        dtype=job["dtype"],
        enforce_eager=True,
        # A prompt under a second mask must pass the experts again.
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        # vLLM 0.32's rotary kernel for the CPU reads 3-D queries wrongly; the PyTorch one does not.
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        attention_config={"backend": job["attention"]},
    )
    try:
        answers = []
        for dropped in job["masks"]:
            with masked(llm, dropped):
                answers.append(answer(llm))
        return answers
    finally:
        llm.llm_engine.engine_core.shutdown()


def answer(llm: LLM) -> dict[str, object]:
    """What an engine says of the prompt."""
    sampling = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    (result,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    found = zip(PROMPT[1:], result.prompt_logprobs[1:], strict=True)
    return {
        "logprobs": [position[token].logprob for token, position in found],
        "generated": list(result.outputs[0].token_ids),
    }


for job in json.loads(sys.argv[1]):
    begun = time.monotonic()
    try:
        line: dict[str, object] = {"answers": serve(job)}
    except Exception as failure:  # noqa: BLE001 - one family's failure must not hide the others
        line = {"error": repr(failure)[:500]}
    gc.collect()
    cleanup_dist_env_and_memory()
    print(json.dumps({"name": job["name"], "seconds": round(time.monotonic() - begun, 1), **line}), flush=True)
