"""Routers that are quantised with the rest of a model: cut along their experts, or refused by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from odd_checkpoint import CONFIG, KEPT, Tensors, dense, gptq, packed, plan, read, rows, tensor, trunk, write

from reap_serve.architectures.names import LINEAR_PARTS, Kind, Role
from reap_serve.errors import ArchitectureError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.router_parts import Rows, rows_of
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify
from reap_serve.weight_headers import Tensor

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
GATE = "model.layers.1.mlp.gate"

ROUTERS: dict[str, Callable[[str], Tensors]] = {
    "packed": lambda base: packed(base, (8, 16)),
    "fp8, a scale a row": lambda base: {
        f"{base}.weight": tensor(base, "F8_E4M3", 8, 16),
        f"{base}.weight_scale": tensor(f"{base}s", "F32", 8, 1),
    },
    "fp8, one scale": lambda base: {
        f"{base}.weight": tensor(base, "F8_E4M3", 8, 16),
        f"{base}.weight_scale": tensor(f"{base}s", "F32"),
        f"{base}.input_scale": tensor(f"{base}i", "F32", 1),
    },
    "fp8, one block": lambda base: {
        f"{base}.weight": tensor(base, "F8_E4M3", 8, 16),
        f"{base}.weight_scale_inv": tensor(f"{base}s", "F32", 1, 1),
    },
    "bias": lambda base: {f"{base}.weight": tensor(base, "BF16", 8, 16), f"{base}.bias": tensor(f"{base}b", "BF16", 8)},
}
WHOLE = ("input_scale", "weight_scale_inv")


def checkpoint(folder: Path, router: Callable[[str], Tensors]) -> tuple[Path, Tensors]:
    tensors = {**dense(), **trunk(linear=packed, router=False)}
    for layer in (0, 1):
        tensors.update(router(f"model.layers.{layer}.mlp.gate"))
    return write(folder, CONFIG, tensors), tensors


@pytest.mark.parametrize("case", ROUTERS)
def test_routers_are_cut_along_their_experts(case: str, tmp_path: Path) -> None:
    source, tensors = checkpoint(tmp_path / "model", ROUTERS[case])
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    written = read(tmp_path / "out")
    for name, entry in ROUTERS[case](GATE).items():
        if name.endswith("weight_shape"):
            assert struct.unpack("<2q", written[name][2]) == (4, 16)
        elif name.endswith(WHOLE) or not entry[1]:
            assert written[name][2] == tensors[name][2]
        else:
            assert (written[name][1][0], written[name][2]) == (4, rows(tensors[name], KEPT[1]))
    assert verify(tmp_path / "out", str(source), None).findings == ()
    assert verify(tmp_path / "out", None, None).findings == ()


def test_a_stale_number_of_rows_is_found(tmp_path: Path) -> None:
    """What another tool would leave: rows cut, and `weight_shape` as it was."""
    tensors = {**dense(), **trunk(linear=packed, router=False, experts=4)}
    for layer in (0, 1):
        router = packed(f"model.layers.{layer}.mlp.gate", (4, 16))
        router[f"model.layers.{layer}.mlp.gate.weight_shape"] = ("I64", (2,), struct.pack("<2q", 8, 16))
        tensors.update(router)
    report = verify(write(tmp_path / "out", {**CONFIG, "num_experts": 4}, tensors), None, None)
    assert [each.detail for each in report.findings if each.check == "rows"] == [
        f"model.layers.{layer}.mlp.gate.weight_shape states 8 rows, 4 expected" for layer in (0, 1)
    ]


def test_experts_that_share_a_number_are_refused(tmp_path: Path) -> None:
    source, _ = checkpoint(tmp_path / "model", lambda base: gptq(base, (8, 16)))
    with pytest.raises(ArchitectureError, match="eight experts share each int32"):
        prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    everything = plan(tmp_path / "all.json", {0: range(8), 1: range(8)})
    prune(str(source), everything, tmp_path / "out", OPTIONS, overwrite=False)
    # Whole, they are sound.
    assert verify(tmp_path / "out", str(source), None).findings == ()


@pytest.mark.parametrize(
    ("part", "shape"), [("qweight", (2, 8)), ("qweight", (16, 2)), ("qzeros", (1, 2)), ("scales", (1, 8))]
)
def test_packed_routers_of_another_count_are_found(part: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """GPTQ with 8 columns, AWQ with int32 of 16, beside 4 experts."""
    router = {**gptq(GATE, (4, 16)), f"{GATE}.qzeros": tensor("z", "I32", 1, 4)}
    router[f"{GATE}.{part}"] = tensor(part, "I32", *shape)
    tensors = {**dense(), **trunk(experts=4), **router}
    del tensors[f"{GATE}.weight"]
    report = verify(write(tmp_path / "out", {**CONFIG, "num_experts": 4}, tensors), None, None)
    assert [each.detail for each in report.findings if each.check == "rows"] == [
        f"{GATE}.{part} has the shape {list(shape)}, which packs no 4 experts"
    ]


@given(
    st.sampled_from(sorted(LINEAR_PARTS)),
    st.sampled_from(["I32", "I64", "F32", "BF16"]),
    st.lists(st.integers(1, 300), max_size=3).map(tuple),
    st.sampled_from([8, 60, 128, 256]),
)
def test_a_part_is_never_carried_whole_when_an_axis_counts_experts(
    part: str, dtype: str, shape: tuple[int, ...], num_rows: int
) -> None:
    """Sliced exactly where its first axis counts the router's rows; whole only where it has one row, or knows none."""
    size = {"I32": 4, "F32": 4, "BF16": 2, "I64": 8}[dtype]
    for each in (shape, (num_rows, *shape[1:])):
        count = size
        for length in each:
            count *= length
        role = Role(Kind.ROUTER_PART, 0, suffix=f"mlp.gate.{part}")
        try:
            found = rows_of(Tensor(f"m.{part}", "f", dtype, each, 0, count), role, num_rows)
        except ArchitectureError:
            continue
        if part.endswith("g_idx"):
            assert found is Rows.ALL
        elif part == "weight_shape":
            assert found is Rows.STATED
            assert each == (2,)
        else:
            assert (found is Rows.SLICED) == (each[:1] == (num_rows,))
            assert found is Rows.SLICED or each[:1] in ((), (1,))
