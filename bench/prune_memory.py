"""Memory that deciding a pruning takes for a checkpoint of a terabyte.

Theory: copying holds one buffer a job whatever the size, so what grows with a model are its headers: about a kilobyte a
tensor. Kimi-K2 in FP8 has some 140,000 of them. The checkpoint here has its names, shapes and sizes, and holes for
data: it takes 32 MB of disk. Everything up to the first copied byte is done: headers, checks, plan, layout, index,
manifest.

Run:
    python bench/prune_memory.py [--folder DIR]

Output: one line,
    <tensors> tensors, <GB> GB: decided in <s> s, peak memory <MiB> MiB above the interpreter
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_EXPERTS, NUM_LAYERS, HIDDEN, INTERMEDIATE, BLOCK = 384, 61, 7168, 2048, 128
ELEMENT_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
CONFIG = {
    "model_type": "kimi_k2",
    "num_hidden_layers": NUM_LAYERS,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DECIDE = """
import sys
from pathlib import Path
from reap_serve.model import open_model
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions, make_job
make_job(open_model(sys.argv[1]), Path(sys.argv[2]), PruneOptions(MtpChoice.CUT, 5 << 30, 2))
"""


def layer_header(layer: int) -> dict[str, dict[str, object]]:
    """Header of one layer's file: router, and six tensors an expert."""
    entries: dict[str, dict[str, object]] = {}
    offset = 0

    def add(name: str, dtype: str, *shape: int) -> None:
        nonlocal offset
        size = ELEMENT_BYTES[dtype]
        for length in shape:
            size *= length
        offsets = [offset, offset + size]
        entries[f"model.layers.{layer}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        offset += size

    add("input_layernorm.weight", "BF16", HIDDEN)
    if layer == 0:
        return entries
    add("mlp.gate.weight", "BF16", NUM_EXPERTS, HIDDEN)
    add("mlp.gate.e_score_correction_bias", "F32", NUM_EXPERTS)
    for expert in range(NUM_EXPERTS):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            rows, columns = (HIDDEN, INTERMEDIATE) if projection == "down_proj" else (INTERMEDIATE, HIDDEN)
            add(f"mlp.experts.{expert}.{projection}.weight", "F8_E4M3", rows, columns)
            add(f"mlp.experts.{expert}.{projection}.weight_scale_inv", "F32", rows // BLOCK, columns // BLOCK)
    return entries


def make_checkpoint(directory: Path) -> tuple[int, int]:
    """Writes headers and holes; returns the number of tensors and their bytes."""
    directory.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(NUM_LAYERS):
        file = f"model-{layer + 1:05d}-of-{NUM_LAYERS:05d}.safetensors"
        entries = layer_header(layer)
        text = json.dumps(entries).encode()
        (_, size) = list(entries.values())[-1]["data_offsets"]  # type: ignore[misc]
        with (directory / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + size)
        weight_map.update(dict.fromkeys(entries, file))
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return len(weight_map), total


def peak_mib(code: str, *arguments: str) -> tuple[float, float]:
    """Peak resident MiB and seconds of processor time of a program."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"exit status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Makes, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        source, plan = Path(folder) / "source", Path(folder) / "plan.json"
        count, total = make_checkpoint(source)
        kept, dropped = list(range(0, NUM_EXPERTS, 2)), list(range(1, NUM_EXPERTS, 2))
        layers = [
            {"layer": f"model.layers.{index}.mlp.experts", "index": index, "kept": kept, "dropped": dropped}
            for index in range(1, NUM_LAYERS)
        ]
        plan.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "every second", "layers": layers}))
        bare, _ = peak_mib("pass")
        peak, seconds = peak_mib(DECIDE, str(source), str(plan))
    print(
        f"{count} tensors, {total / 1e9:.0f} GB: decided in {seconds:.1f} s of processor time, "
        f"peak memory {peak - bare:.0f} MiB above the interpreter"
    )


if __name__ == "__main__":
    main()
