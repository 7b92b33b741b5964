"""Whether `kill -9` at a random moment can leave anything but a whole output or none.

Theory: OUTPUT gets its name by one rename, and a shard inside the staging directory by another; so after any kill
OUTPUT is absent or whole, and the same command again ends with what an undisturbed run writes, without copying finished
shards again.

Run:
    python bench/prune_kill.py [--kills 50] [--megabytes 400] [--folder DIR] [--seed 0]

Output: one line,
    <kills> kills: <n> before the output appeared, <n> after; half-written outputs <n>; results that differ <n>;
    bytes copied again per kill <mean> % of the output
Exit 1 if an output was half-written or a result differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import make_checkpoint, write_plan

SHARD_GIB = 0.02


def command(source: Path, plan: Path, target: Path) -> list[str]:
    """The command that users run, with shards small enough to be caught between two."""
    options = ["--json", "--max-shard-gib", str(SHARD_GIB)]
    return [sys.executable, "-m", "reap_serve", "prune", str(source), str(plan), str(target), *options]


def digest(directory: Path) -> dict[str, str]:
    """Hash of every file, the manifest without its time."""
    found = {}
    for path in sorted(directory.rglob("*")):
        content = path.read_bytes()
        if path.name == "reap_manifest.json":
            manifest = json.loads(content)
            manifest["provenance"].pop("created")
            content = json.dumps(manifest).encode()
        found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def main() -> None:
    """Kills, repeats, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--megabytes", type=float, default=400)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    early = late = half_written = different = 0
    again: list[float] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source, plan, target = folder / "source", folder / "plan.json", folder / "out"
        write_plan(plan, make_checkpoint(source, arguments.megabytes / 1000, "per-expert"))
        begun = time.monotonic()
        undisturbed = json.loads(subprocess.check_output(command(source, plan, target), stderr=subprocess.DEVNULL))
        seconds = time.monotonic() - begun
        expected = digest(target)
        shutil.rmtree(target)
        for _ in range(arguments.kills):
            process = subprocess.Popen(
                command(source, plan, target), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(draw.uniform(0, seconds))
            process.send_signal(signal.SIGKILL)
            process.wait()
            if target.exists():
                late += 1
                half_written += digest(target) != expected
            else:
                early += 1
                result = json.loads(subprocess.check_output(command(source, plan, target), stderr=subprocess.DEVNULL))
                again.append(result["bytes_read"] / undisturbed["bytes_read"])
                different += digest(target) != expected
            shutil.rmtree(target)
    print(
        f"{arguments.kills} kills: {early} before the output appeared, {late} after; "
        f"half-written outputs {half_written}; results that differ {different}; "
        f"bytes copied again per kill {100 * sum(again) / max(len(again), 1):.0f} % of the output"
    )
    sys.exit(1 if half_written or different else 0)


if __name__ == "__main__":
    main()
