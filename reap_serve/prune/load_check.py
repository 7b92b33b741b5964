"""`verify --load`: stock vLLM serves the pruned checkpoint, and answers as the source under the plan's mask.

Each engine runs in a process of its own, one after the other: `python -m reap_serve.prune.load_check` with a request as
JSON on stdin prints the log-probabilities as JSON on its last line.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from reap_serve.errors import EngineError
from reap_serve.model import open_model
from reap_serve.plan.record import Plan
from reap_serve.prune.findings import Finding, error, warning
from reap_serve.records import JsonValue, Record, read_json_object

NUM_PROMPTS = 4
PROMPT_TOKENS = 48
# float32 kernels differ by the order of their sums; in bfloat16 a tie of two experts may fall the other way.
TOLERANCES = {"float32": 1e-3, "auto": 0.5}
ENGINE_SECONDS = 1800


class MaskingEngine(Protocol):
    """An engine that observation is on in."""

    def collective_rpc(self, method: str, *, args: tuple[object, ...]) -> list[str | None]:
        """Calls a method of every worker."""


class LoadRequest(Record):
    """What one engine is asked.

    Attributes:
        path: The checkpoint.
        kept: Experts to mask down to, by layer; None serves the checkpoint as it is.
        dtype: vLLM's dtype.
        prompts: Token ids.
    """

    path: str
    kept: dict[str, tuple[int, ...]] | None
    dtype: str
    prompts: tuple[tuple[int, ...], ...]


def check_by_loading(source: Path, output: Path, plan: Plan) -> Iterator[Finding]:
    """Compares the log-probabilities of random prompts' tokens; in float32 where the model runs in it.

    Yields:
        An error when the pruned checkpoint does not start or answers otherwise; a warning when the source does not
        start here, so that nothing could be compared.
    """
    draw = random.Random(0)
    vocabulary = _vocabulary_size(output)
    prompts = tuple(tuple(draw.randrange(vocabulary) for _ in range(PROMPT_TOKENS)) for _ in range(NUM_PROMPTS))
    kept = {str(layer.index): layer.kept for layer in plan.layers}
    for dtype, tolerance in TOLERANCES.items():
        try:
            pruned = ask(LoadRequest(path=str(output), kept=None, dtype=dtype, prompts=prompts))
        except EngineError as failure:
            if dtype == "auto":
                yield error("load", f"vLLM does not serve it: {failure.what}")
            continue
        try:
            base = ask(LoadRequest(path=str(source), kept=kept, dtype=dtype, prompts=prompts))
        except EngineError as failure:
            yield warning("load", f"vLLM serves it; not compared with the masked source: {failure.what}")
            return
        largest = max(abs(left - right) for left, right in zip(base, pruned, strict=True))
        if not largest <= tolerance:
            yield error(
                "load",
                f"log-probabilities differ from the masked source's by up to {largest:.2g} in {dtype}, "
                f"{tolerance:g} is allowed",
            )
        return


def _vocabulary_size(output: Path) -> int:
    config = read_json_object(output / "config.json")
    text = config.get("text_config")
    part = text if isinstance(text, dict) else config
    size = part.get("vocab_size")
    return size if isinstance(size, int) and size > 0 else 1000


def ask(request: LoadRequest) -> list[float]:
    """The log-probability of each prompt's tokens but the first, one prompt after the other.

    Raises:
        EngineError: The engine did not start or did not answer.
    """
    command = [sys.executable, "-m", "reap_serve.prune.load_check"]
    try:
        run = subprocess.run(
            command,
            input=request.model_dump_json(),
            capture_output=True,
            text=True,
            timeout=ENGINE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"no answer within {ENGINE_SECONDS} s", "try a smaller model") from None
    lines = run.stdout.splitlines()
    if run.returncode or not lines:
        complaints = [line for line in run.stderr.splitlines() if line.strip()] or ["no output"]
        raise EngineError(complaints[-1].removeprefix("error: "), "see vLLM's log")
    found: list[float] = json.loads(lines[-1])
    return found


def answer(request: LoadRequest) -> list[float]:
    """Runs one engine in this process."""
    from reap_serve.adapter.offline import start_engine
    from reap_serve.record.settings import ObserveSettings
    from reap_serve.serve.mask import PLAN_ARGUMENT

    arguments: dict[str, JsonValue] = {
        "dtype": request.dtype,
        "max_model_len": PROMPT_TOKENS + 16,
        "max_num_seqs": NUM_PROMPTS,
        "skip_tokenizer_init": True,
    }
    engine = start_engine(open_model(request.path), ObserveSettings(recording=False), arguments)
    sampling = engine.get_default_sampling_params()
    sampling.max_tokens, sampling.prompt_logprobs, sampling.detokenize = 1, 0, False
    if request.kept is not None:
        sampling.extra_args = {PLAN_ARGUMENT: _load_mask(engine, request.kept)}
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in request.prompts]
    results = engine.generate(prompts, sampling, use_tqdm=False)
    return [
        position[token].logprob
        for prompt, result in zip(request.prompts, results, strict=True)
        for token, position in zip(prompt[1:], result.prompt_logprobs[1:], strict=True)
    ]


def _load_mask(engine: MaskingEngine, kept: Mapping[str, Sequence[int]]) -> str:
    from reap_serve.serve.live_status import PlanEntry

    entry = PlanEntry(id="verify", experts_kept=len(next(iter(kept.values()))), criterion="", bound=False)
    arguments = ("verify", entry.model_dump(), {layer: list(ids) for layer, ids in kept.items()})
    refusals = [refusal for refusal in engine.collective_rpc("reap_load_plan", args=arguments) if refusal]
    if refusals:
        raise EngineError(refusals[0], "see vLLM's log")
    return entry.id


if __name__ == "__main__":
    try:
        found = answer(LoadRequest.model_validate_json(sys.stdin.read()))
    except EngineError as failure:
        sys.exit(f"error: {failure.what}")
    print(json.dumps(found))
