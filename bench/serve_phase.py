"""What a plan that only writes answers costs and gains in speed, beside the full model and the plan for all tokens.

Theory: a mask changes which experts run, not how many a token has, so it frees no time on the full model: it costs the
second routing of `bench/serve_mask.py`. A plan of phase `decode` leaves the prompt's pass as the full model's, and pays
in decode steps alone. What it gains is quality, which `reap-serve compare --sweep-phase both` measures.

Run: `python bench/serve_phase.py` on a quiet machine; the model and traffic that ship with the project. Needs vLLM;
about three minutes on two cores.

Output: one JSON object: `tokens_per_second` of the full model, of the plan (half of the experts) for `all` tokens and
for `decode`, medians over turns that alternate; `ratio` of each to the full model, with its quartiles over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import islice

TURNS, REQUESTS, ANSWER_TOKENS = 15, 32, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=TURNS)
    turns = parser.parse_args().turns
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    from reap_serve.adapter.offline import load_plan, start_engine
    from reap_serve.adapter.renderer import EngineRenderer
    from reap_serve.demo.run import demo_files
    from reap_serve.model import open_model
    from reap_serve.record.settings import ObserveSettings
    from reap_serve.serve.live_status import PlanEntry
    from reap_serve.serve.mask import PLAN_ARGUMENT
    from reap_serve.traffic.read import read_traffic
    from reap_serve.traffic.teacher_forcing import TeacherForcing

    files = demo_files()
    arguments = {"max_model_len": 1024, "enable_prefix_caching": False}
    llm = start_engine(open_model(str(files.model)), ObserveSettings(recording=False), arguments)
    from vllm import SamplingParams

    kept = {str(layer): tuple(range(0, 32, 2)) for layer in range(4)}
    for phase in ("all", "decode"):
        entry = PlanEntry(id=phase, phase=phase, experts_kept=16, criterion="", bound=False)
        load_plan(llm, phase, entry.model_dump(), kept)
    forcing = TeacherForcing(EngineRenderer(llm))
    prompts = []
    for request in islice(read_traffic([str(files.heldout("code"))]), REQUESTS):
        tokens = forcing.tokens(request)
        prompts.append({"prompt_token_ids": tokens.token_ids[: tokens.prompt_tokens]})

    def speed(plan: str) -> float:
        under = {} if plan == "full" else {PLAN_ARGUMENT: plan}
        parameters = SamplingParams(
            max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False, extra_args=under
        )
        begin = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        return len(prompts) * ANSWER_TOKENS / (time.perf_counter() - begin)

    kinds = ("full", "all", "decode")
    for kind in kinds:
        speed(kind)
    found = {kind: [] for kind in kinds}
    for turn in range(turns):
        for kind in kinds if turn % 2 else reversed(kinds):
            found[kind].append(speed(kind))
    ratios = {
        kind: [one / full for one, full in zip(found[kind], found["full"], strict=True)] for kind in ("all", "decode")
    }
    print(
        json.dumps(
            {
                "tokens_per_second": {kind: round(statistics.median(values)) for kind, values in found.items()},
                "ratio": {
                    kind: {
                        "median": round(statistics.median(values), 3),
                        "quartiles": [round(edge, 3) for edge in statistics.quantiles(values, n=4)[::2]],
                    }
                    for kind, values in ratios.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
