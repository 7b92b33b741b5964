"""Throughput and p99 inter-token latency of an observed engine against a plain one, in turn, on real layer shapes.

Each engine is a process of its own, since engines of one process share the kernels' workspace: with vLLM's default
graphs, dummy weights, and one of them with the budget of 2 % that `serve` has. In a turn both answer the same requests,
a block of steps each while the other waits; the first turns are warm-up.

`python -m bench.gpu.throughput CONFIGURATION` is one of the engines: it reads a command a line (`begin N`, `advance`,
`status`) and answers each by a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


class Remote:
    """An engine in another process.

    Args:
        model: Its directory.
        graphs: Name of a mode of `engines.GRAPHS`.
        settings: `ObserveSettings`, None for a plain engine.
    """

    def __init__(self, model: Path, graphs: str, settings: dict[str, Any] | None) -> None:
        configuration = json.dumps({"model": str(model), "graphs": graphs, "settings": settings})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.throughput", configuration],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.taken_bytes = int(self._answer()["taken_bytes"])
        self.done, self.seconds = True, 0.0
        self.intervals: list[float] = []

    def begin(self, sequences: int) -> None:
        """A turn begins."""
        self._ask(f"begin {sequences}")
        self.done = False

    def advance(self) -> None:
        """Runs a block of steps."""
        told = self._ask("advance")
        self.done, self.seconds = told["done"], told["seconds"]
        if self.done:
            self.intervals = told["intervals"]

    def status(self) -> dict[str, Any]:
        """What its worker says of itself."""
        return self._ask("status")

    def end(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"an engine ended with status {self._process.wait()}")
        told: dict[str, Any] = json.loads(line)
        return told


def compare(
    graphs: str = "default",
    sequences: Sequence[int] = SEQUENCES,
    turns: int = TURNS,
    shape: models.Shape = models.REAL,
    lowest_ratio: float = 1 - BUDGET,
) -> dict[str, Any]:
    """Ratios of observed over plain, by the number of sequences."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        models.write_config(Path(directory), shape)
        plain = Remote(Path(directory), graphs, None)
        try:
            observed = Remote(Path(directory), graphs, {"overhead_budget": BUDGET})
            try:
                for number in sequences:
                    found[str(number)] = _turns(plain, observed, number, turns)
                status = observed.status()
            finally:
                observed.end()
        finally:
            plain.end()
    names = ("sample_fraction", "tokens_observed", "failures", "recorder", "held_bytes")
    said = {name: status[name] for name in names}
    said["overhead_fraction"] = round(status["recorder_seconds"] / status["busy_seconds"], 5)
    passed = all(each["throughput_ratio"] >= lowest_ratio for each in found.values()) and said["failures"] == 0
    more_bytes = observed.taken_bytes - plain.taken_bytes
    return {"passed": passed, "sequences": found, "more_memory_bytes": more_bytes, **said}


def _turns(plain: Remote, observed: Remote, sequences: int, turns: int) -> dict[str, Any]:
    ratios: list[float] = []
    waits: dict[Remote, list[float]] = {plain: [], observed: []}
    for turn in range(WARM_UP_TURNS + turns):
        order = (plain, observed)
        for engine in order:
            engine.begin(sequences)
        while not all(engine.done for engine in order):
            for engine in order:
                if not engine.done:
                    engine.advance()
            order = order[::-1]
        if turn >= WARM_UP_TURNS:
            ratios.append(plain.seconds / observed.seconds)
            for engine, kept in waits.items():
                kept.extend(engine.intervals)
    p99 = {engine: float(np.quantile(kept, 0.99)) for engine, kept in waits.items()}
    return {
        "throughput_ratio": round(float(np.mean(ratios)), 4),
        "throughput_ratios": [round(ratio, 4) for ratio in ratios],
        "itl_p99_ratio": round(p99[observed] / p99[plain], 4),
        "tokens_per_second": round(sequences * ANSWER_TOKENS / observed.seconds, 1),
    }


def serve() -> None:
    """One of the engines; what vLLM prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(told: dict[str, Any]) -> None:
        print(json.dumps(told), file=answers, flush=True)

    configuration = json.loads(sys.argv[1])
    engine = Engine(Path(configuration["model"]), configuration["graphs"], configuration["settings"])
    answer({"taken_bytes": engine.taken_bytes})
    for line in sys.stdin:
        command, _, number = line.strip().partition(" ")
        if command == "begin":
            engine.begin(int(number))
            answer({})
        elif command == "advance":
            engine.advance()
            told = {"done": engine.done, "seconds": engine.seconds}
            answer(told | {"intervals": engine.intervals} if engine.done else told)
        else:
            answer(engine.llm.collective_rpc("reap_status")[0])
    engines.stop(engine.llm)


if __name__ == "__main__":
    serve()
