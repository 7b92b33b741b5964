"""Throughput and p99 inter-token latency of an observed engine against a plain one, in turn, on real layer shapes.

Both engines are in one process with vLLM's default graphs, dummy weights, and the budget of 2 % that `serve` has. In a
turn both answer the same requests, a block of steps each; the first turns are warm-up.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import engines, models

SEQUENCES = (1, 16, 128)
PROMPT_TOKENS, ANSWER_TOKENS, BLOCK_STEPS = 128, 96, 8
WARM_UP_TURNS, TURNS = 1, 4
BUDGET = 0.02


class Engine:
    """One of the two, with a clock that runs while it works."""

    def __init__(self, model: Path, graphs: str, settings: dict[str, Any] | None) -> None:
        import torch
        from vllm import SamplingParams

        before = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        self.llm = engines.start(model, graphs, settings, load_format="dummy", max_num_seqs=128)
        self.taken_bytes = before - torch.cuda.mem_get_info()[0] if before else 0
        self._parameters = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
        self.seconds, self.intervals, self._seen = 0.0, [], {}  # type: ignore[var-annotated]
        self._number = 0

    def begin(self, sequences: int) -> None:
        """A turn begins."""
        self.seconds, self.intervals, self._seen = 0.0, [], {}
        for prompt in engines.prompts(sequences, PROMPT_TOKENS, seed=sequences):
            self._number += 1
            self.llm.llm_engine.add_request(str(self._number), prompt, self._parameters)

    @property
    def done(self) -> bool:
        """Whether all is answered."""
        return not self.llm.llm_engine.has_unfinished_requests()

    def advance(self) -> None:
        """Runs a block of steps."""
        started = time.perf_counter() - self.seconds
        for _ in range(BLOCK_STEPS):
            if self.done:
                break
            outputs = self.llm.llm_engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                before, when = self._seen.get(output.request_id, (0, now))
                if before and count > before:
                    self.intervals.append((now - when) / (count - before))
                self._seen[output.request_id] = (count, now)
        self.seconds = time.perf_counter() - started


def compare(graphs: str = "default") -> dict[str, Any]:
    """Ratios of observed over plain, by the number of sequences."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        models.write_real(Path(directory))
        plain = Engine(Path(directory), graphs, None)
        observed = Engine(Path(directory), graphs, {"overhead_budget": BUDGET})
        for sequences in SEQUENCES:
            ratios, waits = [], ([], [])  # type: ignore[var-annotated]
            for turn in range(WARM_UP_TURNS + TURNS):
                for engine in (plain, observed):
                    engine.begin(sequences)
                order = (plain, observed)
                while not all(engine.done for engine in order):
                    for engine in order:
                        engine.advance()
                    order = order[::-1]
                if turn >= WARM_UP_TURNS:
                    ratios.append(plain.seconds / observed.seconds)
                    for kept, engine in zip(waits, (plain, observed), strict=True):
                        kept.extend(engine.intervals)
            p99 = [float(np.quantile(kept, 0.99)) for kept in waits]
            found[str(sequences)] = {
                "throughput_ratio": round(float(np.mean(ratios)), 4),
                "throughput_ratios": [round(ratio, 4) for ratio in ratios],
                "itl_p99_ratio": round(p99[1] / p99[0], 4),
                "tokens_per_second": round(sequences * ANSWER_TOKENS / observed.seconds, 1),
            }
        status = observed.llm.collective_rpc("reap_status")[0]
        sampled = {key: status[key] for key in ("sample_fraction", "tokens_observed", "failures", "recorder")}
        more_bytes = observed.taken_bytes - plain.taken_bytes
        for engine in (plain, observed):
            engines.stop(engine.llm)
    passed = all(each["throughput_ratio"] >= 1 - BUDGET for each in found.values()) and sampled["failures"] == 0
    return {"passed": passed, "sequences": found, "more_memory_bytes": more_bytes, **sampled}
