"""The patched CPU communicator gathers and scatters rows of ranks with unequal numbers; the installed one cannot."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from patched_vllm import RELEASE, patched_files  # noqa: E402

PATCH = RELEASE / "0006-cpu-data-parallel-moe.patch"
MODULE = "vllm/distributed/device_communicators/cpu_communicator.py"
SIZES = [3, 0, 2]


def communicator_class(file: Path) -> Any:
    name = "vllm.distributed.device_communicators.patched_cpu_communicator"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.CpuCommunicator


def rows_of(rank: int) -> Any:
    """Rows that tell of their rank and place."""
    return (100 * rank + torch.arange(SIZES[rank] * 2, dtype=torch.float32)).view(SIZES[rank], 2)


def one_rank(rank: int, file: Path, store: Path, results: Any) -> None:
    size = len(SIZES)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    own = SimpleNamespace(world_size=size, rank_in_group=rank, device_group=torch.distributed.group.WORLD)
    found = communicator_class(file)
    own.all_gatherv = lambda *arguments: found.all_gatherv(own, *arguments)
    ids = torch.full((SIZES[rank], 1), rank, dtype=torch.int32)
    gathered, gathered_ids = found.all_gatherv(own, [rows_of(rank), ids], 0, SIZES)
    scattered = found.reduce_scatterv(own, gathered * (rank + 1), 0, SIZES)
    equal = found.reduce_scatterv(own, torch.ones(2, 6), -1)
    results.put((rank, gathered.tolist(), gathered_ids.flatten().tolist(), scattered.tolist(), equal.tolist()))
    torch.distributed.destroy_process_group()


def test_ranks_of_unequal_numbers_of_rows(tmp_path: Path) -> None:
    file = patched_files(PATCH, tmp_path) / MODULE
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    ranks = [context.Process(target=one_rank, args=(rank, file, tmp_path / "store", results)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    found = sorted(results.get(timeout=60) for _ in ranks)
    for rank in ranks:
        rank.join(60)
    everything = torch.cat([rows_of(rank) for rank in range(3)])
    for rank, gathered, ids, scattered, equal in found:
        assert gathered == everything.tolist()
        assert ids == [0, 0, 0, 2, 2]
        # 1 + 2 + 3 times the rows, of which each rank gets its own.
        assert scattered == (6 * rows_of(rank)).tolist()
        assert equal == [[3.0, 3.0]] * 2


def test_the_installed_one_has_the_defect() -> None:
    """Fails when vLLM has mended it: the patch's Remove-when."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    with pytest.raises(NotImplementedError):
        CpuCommunicator.all_gatherv(SimpleNamespace(world_size=2, rank_in_group=0), torch.zeros(1, 1))
