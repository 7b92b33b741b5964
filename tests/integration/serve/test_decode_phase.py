"""A plan that only writes answers: a recorded answer scores under it as that plan wrote it."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest

from reap_serve.adapter.offline import load_plan, start_engine, stop_engine
from reap_serve.adapter.scoring import score_prompts
from reap_serve.demo.run import demo_files
from reap_serve.model import open_model
from reap_serve.record.requests import PROMPT_ARGUMENT
from reap_serve.record.settings import ObserveSettings
from reap_serve.serve.live_status import PlanEntry
from reap_serve.serve.mask import PLAN_ARGUMENT

NUM_LAYERS, KEPT = 4, tuple(range(0, 32, 2))
PROMPT = list(range(40, 75))


def test_a_recorded_answer_scores_as_the_plan_wrote_it() -> None:
    from vllm import SamplingParams

    arguments = {"dtype": "float32", "max_model_len": 256, "skip_tokenizer_init": True}
    with mock.patch.dict(
        os.environ,
        {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ):
        llm = start_engine(open_model(str(demo_files().model)), ObserveSettings(recording=False), arguments)
        try:
            entry = PlanEntry(id="answers", experts_kept=len(KEPT), criterion="", bound=False, phase="decode")
            load_plan(llm, "answers", entry.model_dump(), {str(layer): KEPT for layer in range(NUM_LAYERS)})
            under = {PLAN_ARGUMENT: entry.id}
            parameters = SamplingParams(
                max_tokens=16, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=0, extra_args=under
            )
            (output,) = llm.generate([{"prompt_token_ids": PROMPT}], [parameters], use_tqdm=False)
            written = output.outputs[0]
            answer = list(written.token_ids)
            said = [position[token].logprob for token, position in zip(answer, written.logprobs, strict=True)]
            asked = [under | {PROMPT_ARGUMENT: len(PROMPT)}, under, {}]
            recorded, as_prompt, full = score_prompts(llm, [PROMPT + answer] * 3, [len(PROMPT)] * 3, asked, num_top=0)
        finally:
            stop_engine(llm)
    np.testing.assert_allclose(recorded.logprob_N, said, atol=1e-4)
    # All of it a prompt: the full model reads it.
    np.testing.assert_allclose(as_prompt.logprob_N, full.logprob_N, atol=1e-4)
    # The full model reads the prompt, and so writes the first token.
    assert recorded.logprob_N[0] == pytest.approx(full.logprob_N[0], abs=1e-4)
    assert np.abs(recorded.logprob_N[1:] - full.logprob_N[1:]).max() > 0.1
