"""Kills a live collection with `kill -9` at random moments and counts what is missing.

Theory: a recorder offers its sums every interval and the writer makes one file of each offer, renamed into its place.
A kill therefore costs at most the tokens seen since the offer of the last file that is there. The writer asks for them
earlier than the interval by a tenth of it and twice the time that a write takes, so that this is at most one interval.

A child process records tokens every millisecond and appends (time, tokens so far) to a log; the parent kills it after
0.2 to 3 intervals, starts the next one in the same directory, and compares the log with the files that are new.

Run: python bench/stats_kill.py [--kills 100] [--interval-seconds 0.5]

Output: one JSON document: kills, files, unreadable_files, worst_missing_ratio (tokens missing / tokens seen in the last
interval before the kill; must be at most 1), worst_missing_seconds, partial_files_left. Exit code 1 when a file is
unreadable, inconsistent, or more than an interval is missing.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from reap_serve.errors import ReapServeError
from reap_serve.model import Fingerprint
from reap_serve.records import provenance
from reap_serve.statistics.file import read_statistics
from reap_serve.statistics.record import ExpertSums, Header, Layer, Statistics, Window
from reap_serve.statistics.rotation import StatisticsWriter

NUM_LAYERS, NUM_EXPERTS, TOP_K = 48, 128, 8
SLICES = ("chat", "code")
LOG_RECORD = struct.Struct("<dq")


def header() -> Header:
    """Header of one offer, with a window of its own."""
    moment = datetime.now(UTC).isoformat()
    window = Window(
        id=uuid.uuid4().hex,
        started=moment,
        ended=moment,
        recorder="bench",
        requests=1,
        prompt_tokens_total=0,
        prompt_tokens_computed=0,
        sample_fraction=1.0,
        complete=True,
    )
    model = Fingerprint(
        architecture="qwen3_moe",
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype="bfloat16",
        quantization=None,
        config_sha256="0" * 64,
        weights_sha256="0" * 64,
    )
    return Header(
        schema_version=1,
        model=model,
        layers=tuple(Layer(index=i, name=f"model.layers.{i}.mlp.experts") for i in range(NUM_LAYERS)),
        slices=SLICES,
        windows=(window,),
        engine={},
        provenance=provenance(),
    )


def collect(directory: str, log_path: str, interval_seconds: float) -> None:
    """Records tokens until it is killed: the child process."""
    rng = np.random.default_rng()
    writer = StatisticsWriter(directory, interval_seconds, minimum_tokens_per_slice=1)
    total = 0
    with open(log_path, "wb", buffering=0) as log:
        while True:
            sums = ExpertSums.zeros(len(SLICES), NUM_LAYERS, NUM_EXPERTS)
            layer_token_count_SPL = np.zeros((len(SLICES), 2, NUM_LAYERS), np.int64)
            while not writer.due:
                tokens, s, p = int(rng.integers(1, 64)), int(rng.integers(len(SLICES))), int(rng.integers(2))
                first_expert = int(rng.integers(NUM_EXPERTS - TOP_K))
                chosen = slice(first_expert, first_expert + TOP_K)
                sums.token_count_SPLE[s, p, :, chosen] += tokens
                sums.weighted_norm_sum_SPLE[s, p, :, chosen] += tokens * 0.5
                layer_token_count_SPL[s, p] += tokens
                total += tokens
                log.write(LOG_RECORD.pack(time.monotonic(), total))
                time.sleep(0.001)
            writer.offer(Statistics(header(), sums, layer_token_count_SPL))


@dataclass(slots=True)
class Tally:
    """What the kills left behind."""

    files: set[Path] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    worst_missing_ratio: float = 0.0
    worst_missing_seconds: float = 0.0

    def count_tokens(self, path: Path) -> int:
        """Tokens in a file; notes what is wrong with it."""
        try:
            statistics = read_statistics(str(path))
        except ReapServeError as error:
            self.problems.append(str(error))
            return 0
        count_SPL = statistics.sums.token_count_SPLE.sum(axis=-1)
        if not np.array_equal(count_SPL, TOP_K * statistics.layer_token_count_SPL):
            self.problems.append(f"{path.name}: counts do not add up")
        if not np.array_equal(statistics.sums.weighted_norm_sum_SPLE, statistics.sums.token_count_SPLE * 0.5):
            self.problems.append(f"{path.name}: sums and counts belong to different tokens")
        return sum(statistics.tokens_per_slice())

    def add(self, directory: Path, log_path: Path, interval_seconds: float) -> None:
        """Compares one child's log with the files that it left."""
        new = set(directory.glob("*.safetensors")) - self.files
        self.files |= new
        written = sum(self.count_tokens(path) for path in new)
        content = log_path.read_bytes()
        log = np.frombuffer(content[: len(content) // LOG_RECORD.size * LOG_RECORD.size], "<f8,<i8")
        if not len(log):
            return
        times, totals = log["f0"], log["f1"]
        seen = int(totals[-1])
        before = np.searchsorted(times, times[-1] - interval_seconds, side="right")
        in_last_interval = seen - (int(totals[before - 1]) if before else 0)
        missing_since = times[np.searchsorted(totals, written, side="right") - 1] if written else times[0]
        self.worst_missing_ratio = max(self.worst_missing_ratio, (seen - written) / in_last_interval)
        self.worst_missing_seconds = max(self.worst_missing_seconds, float(times[-1] - missing_since))


def main() -> None:
    """Kills, compares, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--interval-seconds", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, metavar=("DIRECTORY", "LOG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        collect(*arguments.child, arguments.interval_seconds)
    moments = random.Random(arguments.seed)
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        directory, log_path = Path(name, "statistics"), Path(name, "log")
        command = [sys.executable, __file__, "--interval-seconds", str(arguments.interval_seconds)]
        for _ in range(arguments.kills):
            log_path.unlink(missing_ok=True)
            child = subprocess.Popen([*command, "--child", str(directory), str(log_path)])
            while not (log_path.exists() and log_path.stat().st_size) and child.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.2, 3) * arguments.interval_seconds)
            child.kill()
            child.wait()
            tally.add(directory, log_path, arguments.interval_seconds)
        partial_files = len(list(directory.glob(".*.partial")))
    document = {
        "kills": arguments.kills,
        "files": len(tally.files),
        "unreadable_files": len(tally.problems),
        "worst_missing_ratio": round(tally.worst_missing_ratio, 3),
        "worst_missing_seconds": round(tally.worst_missing_seconds, 3),
        "partial_files_left": partial_files,
    }
    sys.stdout.write(json.dumps(document) + "\n")
    for problem in tally.problems:
        sys.stderr.write(problem + "\n")
    sys.exit(1 if tally.problems or tally.worst_missing_ratio > 1 else 0)


if __name__ == "__main__":
    main()
