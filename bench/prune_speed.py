"""How fast `reap-serve prune` is beside a plain copy, and beside loading and saving a model.

Theory: pruning moves the kept bytes once, so its floor is `cp` of the same number of bytes between the same disks.
Loading and saving moves every byte of the source into memory and the kept ones out again; llm-compressor's own pruning
and saving do so too, and its calibration is left out here: the kept experts are given.

Run:
    python bench/prune_speed.py [--gigabytes 16] [--layout per-expert|stacked|both] [--folder DIR] [--small-gigabytes 1]
        [--llmcompressor VENV/bin/python]

llm-compressor pins other releases than vLLM and lives in a virtual environment of its own:
    python -m venv VENV && VENV/bin/pip install llmcompressor==0.14.0.1

Needs about 2.2 times `--gigabytes` of free disk; everything it makes is removed. Before each run the files are
written back and leave the page cache; pruning and copying both end with their bytes on the disk (fsync).
The copy and the pruning alternate, twice, and the faster of each counts. Processor time says the same on a machine with
other work; the digest of each tensor is in it. `verify` reads what was written once more, from the page cache.

Output: one line a layout,
    <layout> <size> GB: prune <s> s, cp <s> s, ratio <prune/cp>; processor <s> and <s> s, ratio <prune/cp>;
    verify <s> s; peak memory <MiB> MiB above the interpreter
and one at `--small-gigabytes` for transformers, and one for llm-compressor where it is given:
    <tool> at <size> GB: load-and-save <s> s, prune <s> s, ratio <load-and-save/prune>; peak memory <MiB> against <MiB>
    MiB; tensors that differ <n>
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from random_checkpoint import make_checkpoint, write_plan


def forget_cache(files: Sequence[Path]) -> None:
    """Puts the page cache in the same state before each run: written back, and empty where that is allowed."""
    os.sync()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took: seconds by the clock and of the processor, and peak resident MiB."""

    seconds: float
    processor: float
    peak: float


def run_measured(command: Sequence[str]) -> Cost:
    """Runs a command to its end."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {complaint.decode()}")
    return Cost(time.monotonic() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def copy_command(sources: Sequence[Path], target: Path) -> list[str]:
    """`cp`, and the bytes on the disk as after `prune`."""
    names = " ".join(f"'{path}'" for path in sources)
    return ["sh", "-c", f"mkdir '{target}' && cp {names} '{target}' && sync '{target}'/*"]


def prune_command(source: Path, plan: Path, target: Path) -> list[str]:
    """The command that users run."""
    return [sys.executable, "-m", "reap_serve", "prune", str(source), str(plan), str(target), "--json"]


def compare_with_copy(folder: Path, gigabytes: float, layout: str) -> str:
    """One line: pruning against `cp` of the files that pruning wrote."""
    source, target, copied, plan = (folder / name for name in ("source", "pruned", "copied", "plan.json"))
    write_plan(plan, make_checkpoint(source, gigabytes, layout))
    pruned, copies = [], []
    for _ in range(2):
        forget_cache(sorted(source.glob("*.safetensors")))
        shutil.rmtree(target, ignore_errors=True)
        pruned.append(run_measured(prune_command(source, plan, target)))
        files = sorted(target.glob("*.safetensors"))
        forget_cache(files)
        copies.append(run_measured(copy_command(files, copied)))
        shutil.rmtree(copied)
    checked = run_measured([sys.executable, "-m", "reap_serve", "verify", str(target), "--json"])
    bare = run_measured([sys.executable, "-c", "pass"])
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shutil.rmtree(source)
    shutil.rmtree(target)
    best, floor = (min(cost.seconds for cost in costs) for costs in (pruned, copies))
    work, floor_work = (min(cost.processor for cost in costs) for costs in (pruned, copies))
    return (
        f"{layout} {size / 1e9:.1f} GB: prune {best:.1f} s, cp {floor:.1f} s, ratio {best / floor:.2f}; "
        f"processor {work:.1f} and {floor_work:.1f} s, ratio {work / floor_work:.2f}; verify {checked.seconds:.1f} s; "
        f"peak memory {max(cost.peak for cost in pruned) - bare.peak:.0f} MiB above the interpreter"
    )


LOAD_AND_SAVE = """
import sys, torch, transformers
source, target, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
for layer in model.model.layers:
    mlp = layer.mlp
    mlp.gate.weight = torch.nn.Parameter(mlp.gate.weight[::every].clone())
    mlp.experts.gate_up_proj = torch.nn.Parameter(mlp.experts.gate_up_proj[::every].clone())
    mlp.experts.down_proj = torch.nn.Parameter(mlp.experts.down_proj[::every].clone())
model.config.num_experts = model.config.num_local_experts = mlp.gate.weight.shape[0]
model.save_pretrained(target)
"""


LLM_COMPRESSOR = """
import sys, torch, transformers
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.reap.utils import get_moe_attrs, prune_moe_layer, update_model_config
from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained
source, target, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
linearize_moe(model)
attributes = get_moe_attrs(model, [])
kept = list(range(0, attributes.num_experts, every))
for name in attributes.moe_layer_names:
    prune_moe_layer(model, name, kept, attributes)
update_model_config(model, attributes, len(kept))
modify_save_pretrained(model)
model.save_pretrained(target)
"""


def compare_with_loading(folder: Path, gigabytes: float, llmcompressor: Path | None) -> Iterator[str]:
    """A line a tool: loading, slicing in memory and saving against pruning."""
    source, target, saved, plan = (folder / name for name in ("source", "pruned", "saved", "plan.json"))
    write_plan(plan, make_checkpoint(source, gigabytes, "per-expert"))
    forget_cache(sorted(source.glob("*.safetensors")))
    pruning = run_measured(prune_command(source, plan, target))
    tools = {"transformers": [sys.executable, "-c", LOAD_AND_SAVE]}
    if llmcompressor is not None:
        tools["llm-compressor"] = [str(llmcompressor), "-c", LLM_COMPRESSOR]
    for tool, command in tools.items():
        forget_cache(sorted(source.glob("*.safetensors")))
        loading = run_measured([*command, str(source), str(saved), "2"])
        different = num_different(target, saved)
        shutil.rmtree(saved)
        yield (
            f"{tool} at {gigabytes:.1f} GB: load-and-save {loading.seconds:.1f} s, prune "
            f"{pruning.seconds:.1f} s, ratio {loading.seconds / pruning.seconds:.1f}; "
            f"peak memory {loading.peak:.0f} against {pruning.peak:.0f} MiB; "
            f"tensors that differ {different}"
        )
    shutil.rmtree(source)
    shutil.rmtree(target)


def num_different(left: Path, right: Path) -> int:
    """Tensors that only one of two checkpoints has, or that have other bytes in them."""
    from reap_serve.prune.checkpoint import read_checkpoint

    def read(directory: Path) -> Mapping[str, bytes]:
        hashes = {}
        for name, tensor in read_checkpoint(directory).tensors.items():
            with (directory / tensor.file).open("rb") as handle:
                handle.seek(tensor.offset)
                hashes[name] = hashlib.sha256(handle.read(tensor.num_bytes)).digest()
        return hashes

    ours, theirs = read(left), read(right)
    return sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def lines(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The measurements that were asked for."""
    layouts = ("per-expert", "stacked") if arguments.layout == "both" else (arguments.layout,)
    for layout in layouts if arguments.gigabytes else ():
        yield compare_with_copy(folder, arguments.gigabytes, layout)
    if arguments.small_gigabytes:
        yield from compare_with_loading(folder, arguments.small_gigabytes, arguments.llmcompressor)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16, help="0 leaves the copies out")
    parser.add_argument("--layout", choices=("per-expert", "stacked", "both"), default="both")
    parser.add_argument("--small-gigabytes", type=float, default=1, help="0 leaves the other tools out")
    parser.add_argument("--llmcompressor", type=Path, default=None, help="the Python that llm-compressor is in")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; its disk is what is measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for line in lines(arguments, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
