"""How fast `traffic show` reads, and in how much memory.

A file of synthetic OpenAI Batch lines (1 GB by default; chats of 1 to 12 messages with lengths from a log-normal
distribution, some with tools, all with an answer and its usage as vLLM writes them, fixed seed) is made once and read
by four commands, each in a process of its own:

    wc -l                       reading alone
    json.loads of every line    the parser of the standard library, nothing kept
    reap-serve traffic show     the command
    ... of the first tenth      the same, for the memory

    constant memory: peak(whole) <= 1.1 · peak(tenth)
    speed ratio:     MB per processor second(show) / MB per processor second(json.loads)

Processor time is taken for the ratio because it says the same on a machine with other work.

    python bench/traffic_speed.py [--bytes N] [--keep PATH] [--json]

Output: seconds, MB/s (10^6 bytes) by the clock and by processor time, and peak resident MB of each; the two figures
above; exit 1 when memory grows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("model", "expert", "layer", "token", "route", "gate", "server", "stream", "batch", "cache", "request")
COMMANDS = {
    "wc -l": ["wc", "-l", "{whole}"],
    "json.loads": [
        sys.executable,
        "-c",
        "import json, sys\nfor line in open(sys.argv[1], 'rb'):\n    json.loads(line)",
        "{whole}",
    ],
    "traffic show": [str(Path(sys.executable).with_name("reap-serve")), "traffic", "show", "{whole}", "--json"],
    "traffic show, a tenth": [
        str(Path(sys.executable).with_name("reap-serve")),
        "traffic",
        "show",
        "{tenth}",
        "--json",
    ],
}


def batch_line(number: int, generator: random.Random) -> bytes:
    """One chat with its answer."""

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=max(1, int(generator.lognormvariate(4.0, 1.0)))))

    messages = [
        {"role": ("user", "assistant")[turn % 2], "content": text()} for turn in range(generator.randrange(1, 13, 2))
    ]
    body: dict[str, object] = {"model": "m", "messages": messages, "metadata": {"reap_slice": f"s{number % 3}"}}
    if number % 5 == 0:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    message = {"role": "assistant", "content": text(), "refusal": None, "tool_calls": [], "reasoning": None}
    prompt_tokens, answer_tokens = (len(str(part)) // 4 for part in (messages, message["content"]))
    answer = {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens},
    }
    line = {
        "custom_id": str(number),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
        "response": {"status_code": 200, "body": answer},
    }
    return json.dumps(line).encode() + b"\n"


def make(path: Path, size: int) -> None:
    """Writes lines until the file has a size; a block of different lines is repeated."""
    generator = random.Random(0)
    block = [batch_line(number, generator) for number in range(5000)]
    written = 0
    with path.open("wb") as handle:
        while written < size:
            for line in block:
                if written >= size:
                    break
                written += handle.write(line)


def run(command: list[str]) -> tuple[float, float, float]:
    """Runs a command; gives its seconds by the clock and of the processor, and its peak resident memory in MB."""
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.execvp(command[0], command)
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main(size: int, keep: Path | None, as_json: bool) -> int:
    """Measures every command and prints the table."""
    with tempfile.TemporaryDirectory() as directory:
        whole = keep or Path(directory) / "whole.jsonl"
        tenth = Path(directory) / "tenth.jsonl"
        if not whole.exists():
            make(whole, size)
        make(tenth, whole.stat().st_size // 10)
        found = {}
        for name, command in COMMANDS.items():
            used = tenth if "{tenth}" in command else whole
            seconds, processor, peak = run([part.format(whole=whole, tenth=tenth) for part in command])
            megabytes = used.stat().st_size / 1e6
            found[name] = {
                "seconds": seconds,
                "mb_per_second": megabytes / seconds,
                "mb_per_processor_second": megabytes / processor,
                "peak_mb": peak,
            }
    growth = found["traffic show"]["peak_mb"] / found["traffic show, a tenth"]["peak_mb"]
    rate = "mb_per_processor_second"
    ratio = found["traffic show"][rate] / found["json.loads"][rate]
    if as_json:
        print(json.dumps({"commands": found, "memory_ratio": growth, "speed_ratio_to_json_loads": ratio}))
    else:
        for name, row in found.items():
            rates = f"{row['mb_per_second']:6.0f} MB/s {row[rate]:6.0f} MB/processor s"
            print(f"{name:22} {row['seconds']:7.1f} s {rates} {row['peak_mb']:5.0f} MB")
        print(f"memory, whole / tenth: {growth:.2f}; speed, show / json.loads: {ratio:.2f}")
    return int(growth > 1.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--keep", type=Path, help="use this file, and leave it there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.bytes, arguments.keep, arguments.json))
