"""One engine's answer to `verify --load`: log-probabilities of prompts' tokens, under a mask if one is asked for.

`python -m reap_serve.serve.load_answer` with a `LoadRequest` as JSON on stdin prints them as JSON on its last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from reap_serve.adapter.offline import load_plan, start_engine
from reap_serve.adapter.scoring import score_prompts
from reap_serve.errors import EngineError
from reap_serve.model import open_model
from reap_serve.prune.load_check import NUM_PROMPTS, PROMPT_TOKENS, LoadRequest
from reap_serve.record.settings import ObserveSettings
from reap_serve.serve.live_status import PlanEntry
from reap_serve.serve.mask import PLAN_ARGUMENT

if TYPE_CHECKING:
    from reap_serve.records import JsonValue


def answer(request: LoadRequest) -> list[float]:
    """Runs one engine in this process."""
    arguments: dict[str, JsonValue] = {
        "dtype": request.dtype,
        "max_model_len": PROMPT_TOKENS + 16,
        "max_num_seqs": NUM_PROMPTS,
        "skip_tokenizer_init": True,
    }
    engine = start_engine(open_model(request.path), ObserveSettings(recording=False), arguments)
    extra: dict[str, JsonValue] = {}
    if request.kept is not None:
        entry = _entry(request.kept)
        load_plan(engine, "verify", entry.model_dump(), request.kept)
        extra = {PLAN_ARGUMENT: entry.id}
    count = len(request.prompts)
    scores = score_prompts(engine, request.prompts, [1] * count, [extra] * count, num_top=0)
    return [value for each in scores for value in each.logprob_N.tolist()]


def _entry(kept: Mapping[str, Sequence[int]]) -> PlanEntry:
    return PlanEntry(id="verify", experts_kept=len(next(iter(kept.values()))), criterion="", bound=False)


if __name__ == "__main__":
    try:
        found = answer(LoadRequest.model_validate_json(sys.stdin.read()))
    except EngineError as failure:
        sys.exit(f"error: {failure.what}")
    print(json.dumps(found))
