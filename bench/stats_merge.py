"""Merges 1,000 statistics files of a 61-layer, 384-expert model with 8 slices and both phases.

Theory: a file holds 61 * 384 * 8 slices * 2 phases cells. A cell is a count (2 bytes below 65,536), five float64 sums
and two maxima that are float32 values: 50 bytes, so 18.7 MB a file and 18.7 GB in all. Merging reads each byte
once and adds it to a checksum and to one accumulator of 24 MB, so it runs at the speed of reading. The float64
sums of 1,000 positive terms differ from the exact ones by at most 1,000 * 2^-53 = 1.1e-13 relative.

Run: python bench/stats_merge.py [--files 1000] [--directory DIR]
     Needs 19 GB in DIR (default: a temporary directory). Every file has its own values: file i holds a base array
     times 1 + i/4096, so the exact sums are known without a second merge.

Output: one JSON document: files, bytes, seconds, cpu_seconds, gigabytes_per_second, peak_rss_gib,
largest_relative_error, seconds_ratio (seconds / 20), memory_ratio (peak_rss_gib / 1); both ratios and the error / 1e-12
must be below 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np

from reap_serve.model import Fingerprint
from reap_serve.records import provenance
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.record import (
    EXPERT_FIELDS,
    MAX_FIELDS,
    OPTIONAL_FIELDS,
    ExpertSums,
    Header,
    Layer,
    Statistics,
    Window,
    is_count,
)

NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_SLICES = 61, 384, 8, 8
STEPS = 4096

MERGE = """
import json, resource, sys, time
from pathlib import Path
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.merge import merge_files
paths = sorted(str(path) for path in Path(sys.argv[1]).glob("*.safetensors"))
start = time.perf_counter()
merged = merge_files(paths)
write_statistics(merged, sys.argv[2], overwrite=True)
seconds = time.perf_counter() - start
print(json.dumps([seconds, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))
"""


def base_statistics() -> Statistics:
    """Sums whose float64 values have 40 random bits, so that the factor 1 + i/4096 is applied exactly."""
    rng = np.random.default_rng(0)
    sums = ExpertSums.zeros(NUM_SLICES, NUM_LAYERS, NUM_EXPERTS)
    shape = sums.token_count_SPLE.shape
    for field in EXPERT_FIELDS:
        if field in OPTIONAL_FIELDS:
            continue
        values = getattr(sums, field)
        if is_count(field):
            values[...] = rng.integers(1, 10_000, shape)
        elif field in MAX_FIELDS:
            values[...] = rng.random(shape, np.float32)
        else:
            values[...] = rng.integers(1, 2**40, shape) * 2.0**-30
    model = Fingerprint(
        architecture="deepseek_v3",
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        dtype="bfloat16",
        quantization="fp8",
        config_sha256="0" * 64,
        weights_sha256="0" * 64,
    )
    header = Header(
        schema_version=1,
        model=model,
        layers=tuple(Layer(index=i, name=f"model.layers.{i}.mlp.experts") for i in range(NUM_LAYERS)),
        slices=tuple(f"tenant-{s}" for s in range(NUM_SLICES)),
        windows=(window(0),),
        engine={"vllm": "0.32.0"},
        provenance=provenance(),
    )
    return Statistics(header, sums, sums.token_count_SPLE.sum(axis=-1) // TOP_K)


def window(i: int) -> Window:
    """Window of file i."""
    return Window(
        id=f"{i:032x}",
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:01:00+00:00",
        recorder="inline",
        requests=1000,
        prompt_tokens_total=100_000,
        prompt_tokens_computed=90_000,
        sample_fraction=1.0,
        complete=True,
    )


def write_files(base: Statistics, num_files: int, directory: Path) -> None:
    """Writes file i as the base's float64 sums times 1 + i/4096, its counts and maxima as they are."""
    for i in range(num_files):
        factor = 1 + i / STEPS
        fields = {
            name: values if is_count(name) or name in MAX_FIELDS else values * factor
            for name, values in base.fields_by_name().items()
        }
        header = base.header.model_copy(update={"windows": (window(i),)})
        path = directory / f"{i:05d}.safetensors"
        write_statistics(Statistics.from_fields(header, fields), str(path), overwrite=False)


def largest_relative_error(base: Statistics, merged: Statistics, num_files: int) -> float:
    """Largest |merged - exact| / exact over float64 sums; counts and maxima must agree to the bit."""
    total = sum((1 + Fraction(i, STEPS) for i in range(num_files)), Fraction(0))
    worst = 0.0
    for name, values in base.fields_by_name().items():
        found = merged.fields_by_name()[name]
        if is_count(name) or name in MAX_FIELDS:
            wanted = values * num_files if is_count(name) else values
            assert np.array_equal(found, wanted), f"{name} is not exact"
            continue
        # The exact sum is value * total; float128 keeps 11 more bits than the sums that it judges.
        exact = values.astype(np.longdouble) * (np.longdouble(total.numerator) / np.longdouble(total.denominator))
        worst = max(worst, float((np.abs(found - exact) / exact).max()))
    return worst


def main() -> None:
    """Writes, merges in a process of its own, checks, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    from reap_serve.statistics.file import read_statistics

    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        base = base_statistics()
        write_files(base, arguments.files, directory)
        num_bytes = sum(path.stat().st_size for path in directory.iterdir())
        output = directory / "merged"
        ran = subprocess.run(
            [sys.executable, "-c", MERGE, name, str(output)], capture_output=True, text=True, check=True
        )
        seconds, cpu_seconds, peak_rss_gib = json.loads(ran.stdout)
        error = largest_relative_error(base, read_statistics(str(output)), arguments.files)
    document = {
        "files": arguments.files,
        "bytes": num_bytes,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "gigabytes_per_second": round(num_bytes / seconds / 1e9, 2),
        "peak_rss_gib": round(peak_rss_gib, 3),
        "largest_relative_error": error,
        "seconds_ratio": round(seconds / 20, 3),
        "memory_ratio": round(peak_rss_gib, 3),
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
