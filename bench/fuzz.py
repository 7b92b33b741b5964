"""Damaged inputs of every kind against every command that reads them, and the live routes.

An input fails when a command ends with a traceback or a defect, takes longer than 20 s or more than 1.5 GB, prints a
control character or no error line, writes anything but its output, or leaves an output although it failed.

    python bench/fuzz.py --count 20000            # as many inputs, spread over the targets
    python bench/fuzz.py --minutes 1 --seed 7     # as many as fit
    python bench/fuzz.py --seed 7 --only 1234     # one of them again, with what it found
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

MAX_SECONDS = 20.0
MAX_BYTES = 1_500_000_000
# What a worker may write besides the input's own directory: nothing but these.
DEVICES = ("/dev/null", "/dev/tty")
WRITES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
}


def main() -> int:
    """Runs the inputs; exit 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of all inputs; input I of a seed is always the same")
    parser.add_argument("--count", type=int, default=None, help="inputs; default: until the time is up")
    parser.add_argument("--minutes", type=float, default=None, help="stop after so long")
    parser.add_argument("--only", type=int, default=None, help="run this input alone")
    parser.add_argument("--targets", default=None, help="names, by commas; default: all")
    arguments = parser.parse_args()
    count = arguments.count if arguments.count or arguments.minutes or arguments.only is not None else 1000
    deadline = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    first = 0 if arguments.only is None else arguments.only
    last = first + 1 if arguments.only is not None else count
    chosen = None if arguments.targets is None else arguments.targets.split(",")
    with tempfile.TemporaryDirectory(prefix="reap-serve-fuzz-") as folder:
        summary = Supervisor(Path(folder), arguments.seed, chosen).run(first, last, deadline)
    print(json.dumps(summary))
    return 1 if summary["failed"] else 0


class Supervisor:
    """Runs inputs in a worker that it can kill, and starts another one behind an input that killed it."""

    def __init__(self, root: Path, seed: int, targets: list[str] | None) -> None:
        self._root, self._seed, self._targets = root, seed, targets
        self._context = multiprocessing.get_context("spawn")

    def run(self, first: int, last: int | None, deadline: float | None) -> dict[str, Any]:
        """The inputs from `first` on, to `last` or until the deadline."""
        started, index, failed = time.monotonic(), first, 0
        counts: Counter[str] = Counter()
        slowest, largest = 0.0, 0
        while (last is None or index < last) and (deadline is None or time.monotonic() < deadline):
            ours, theirs = self._context.Pipe()
            born = time.monotonic()
            worker = self._context.Process(
                target=work, args=(theirs, str(self._root), self._seed, index, last, deadline, self._targets, born)
            )
            worker.start()
            theirs.close()
            # The first answer waits for the imports.
            patience = MAX_SECONDS + 120
            while True:
                report = _next(ours, patience)
                patience = MAX_SECONDS
                if report is None or report["index"] is None:
                    break
                counts[report["target"]] += 1
                slowest, largest = max(slowest, report["seconds"]), max(largest, report["bytes"])
                failed += bool(report["findings"])
                for finding in report["findings"]:
                    print(
                        f"FAILED --seed {self._seed} --only {report['index']} ({report['target']}): {finding}",
                        flush=True,
                    )
                index = report["index"] + 1
            if report is None:
                state = (
                    f"killed the worker ({worker.exitcode})"
                    if not worker.is_alive()
                    else f"takes over {MAX_SECONDS:g} s"
                )
                print(f"FAILED --seed {self._seed} --only {index}: {state}", flush=True)
                failed, index = failed + 1, index + 1
            worker.kill()
            worker.join()
            if report is not None:
                break
        return {
            "seed": self._seed,
            "inputs": sum(counts.values()),
            "failed": failed,
            "seconds": round(time.monotonic() - started, 1),
            "slowest_seconds": round(slowest, 2),
            "largest_bytes": largest,
            "targets": dict(sorted(counts.items())),
        }

    def _say(self, index: int, what: str) -> None:
        print(f"FAILED --seed {self._seed} --only {index} {what}", flush=True)


def _next(connection: Connection, patience: float) -> dict[str, Any] | None:
    """The worker's next report; None where it hangs or is dead."""
    try:
        return dict(connection.recv()) if connection.poll(patience) else None
    except (EOFError, OSError):
        return None


def work(
    connection: Connection,
    root: str,
    seed: int,
    first: int,
    last: int | None,
    deadline: float | None,
    chosen: list[str] | None,
    born: float,
) -> None:
    """A worker's life: inputs one after the other, each with its verdict."""
    import torch  # noqa: F401 - before the bound on memory
    from fuzz_inputs import Inputs
    from fuzz_routes import run_routes
    from fuzz_targets import TARGETS, Case, fresh_home, run_case

    base = Path(root)
    sound = base / "sound"
    shutil.rmtree(sound, ignore_errors=True)
    inputs = Inputs(sound)
    names = [name for name in (*TARGETS, "routes") if chosen is None or name in chosen]
    home = fresh_home(base)
    os.environ["TMPDIR"] = tempfile.tempdir = str(base)
    watcher = _Watcher(base)
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MAX_BYTES, address_space + MAX_BYTES))
    if deadline is not None:
        # Imports are not counted.
        deadline += time.monotonic() - born
    index = first
    while (last is None or index < last) and (deadline is None or time.monotonic() < deadline):
        name = names[index % len(names)]
        random_ = random.Random(f"{seed} {index}")
        home = fresh_home(base)
        os.chdir(home)
        case = Case(home, sound)
        Path("/proc/self/clear_refs").write_text("5")
        started = time.monotonic()
        watcher.written = []
        try:
            if name == "routes":
                run_routes(case, inputs, random_)
            else:
                run_case(case, TARGETS[name], inputs, random_)
        except BaseException:  # noqa: BLE001 - the fuzzer's own failure is one, too
            case.findings.append(traceback.format_exc())
        case.findings += [f"{path} was written" for path in watcher.written]
        seconds, peak = time.monotonic() - started, _peak_bytes()
        if peak > MAX_BYTES:
            case.findings.append(f"{peak / 1e9:.2f} GB")
        findings = [finding for finding in case.findings if not finding.startswith("skipped")]
        connection.send({"index": index, "target": name, "findings": findings, "seconds": seconds, "bytes": peak})
        index += 1
    connection.send({"index": None})


class _Watcher:
    """Notes what Python writes outside a directory."""

    def __init__(self, root: Path) -> None:
        self.written: list[str] = []
        self._root = str(root)
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._note(arguments[0])
        elif event in WRITES:
            for position in WRITES[event]:
                self._note(arguments[position])

    def _note(self, path: Any) -> None:
        text = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        if text and not text.startswith((self._root, "/proc/")) and text not in DEVICES:
            self.written.append(text)


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
