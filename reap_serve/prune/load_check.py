"""`verify --load`: stock vLLM serves the pruned checkpoint, and answers as the source under the plan's mask.

Each engine runs in a process of its own, one after the other: the module ANSWER with a request as JSON on stdin prints
the log-probabilities as JSON on its last line.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from reap_serve.errors import EngineError
from reap_serve.plan.record import Plan
from reap_serve.prune.findings import Finding, error, warning
from reap_serve.records import Record, read_json_object

# Of a later stage: known by its name alone.
ANSWER = "reap_serve.serve.load_answer"
NUM_PROMPTS = 4
PROMPT_TOKENS = 48
# float32 kernels differ by the order of their sums; in bfloat16 a tie of two experts may fall the other way.
TOLERANCES = {"float32": 1e-3, "auto": 0.5}
ENGINE_SECONDS = 1800


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
    kept = {str(index): ids for index, ids in plan.kept_by_layer.items()}
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
    command = [sys.executable, "-m", ANSWER]
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
