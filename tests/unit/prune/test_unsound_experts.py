"""Experts that calibration never reached, or that carry scales that no kernel can use: named, and dropped first."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from odd_checkpoint import (
    CONFIG,
    KEPT,
    Linear,
    Tensors,
    dense,
    gptq,
    number,
    nvfp4,
    packed,
    plain,
    plan,
    read,
    tensor,
    trunk,
    write,
)

from reap_serve.errors import InputFileError
from reap_serve.model import open_model
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions, make_job
from reap_serve.prune.run import prune
from reap_serve.prune.unsound import unsound_experts
from reap_serve.prune.verify import verify

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
EXPERT = "model.layers.0.mlp.experts.6"
KEEPS = {0: [0, 2, 5, 6], 1: [1, 2, 3, 6]}
W4A4 = {**CONFIG, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def fp8(name: str, shape: tuple[int, int]) -> Tensors:
    return {f"{name}.weight": tensor(name, "F8_E4M3", *shape), f"{name}.weight_scale": number(0.5)}


def mixed(linear: Linear, odd: str) -> Linear:
    return lambda name, shape: plain(name, shape) if f"{name}.".startswith(f"{EXPERT}.{odd}") else linear(name, shape)


@pytest.mark.parametrize("linear", [gptq, packed, fp8])
@pytest.mark.parametrize("odd", ["", "down_proj."])
def test_an_expert_that_calibration_never_reached(linear: Linear, odd: str, tmp_path: Path) -> None:
    source = write(tmp_path / "model", CONFIG, {**dense(), **trunk(linear=mixed(linear, odd))})
    prune(str(source), plan(tmp_path / "drops.json"), tmp_path / "out", OPTIONS, overwrite=False)
    assert verify(tmp_path / "out", str(source), None).findings == ()
    with pytest.raises(InputFileError, match=r"model\.layers\.0\.mlp\.experts\.6 has .* in BF16"):
        prune(str(source), plan(tmp_path / "keeps.json", KEEPS), tmp_path / "other", OPTIONS, overwrite=False)
    assert not (tmp_path / "other").exists()
    assert list(unsound_experts(open_model(str(source)))) == [(0, 6)]


def test_verify_names_an_expert_in_another_form(tmp_path: Path) -> None:
    source = write(tmp_path / "model", CONFIG, {**dense(), **trunk(linear=mixed(packed, ""))})
    report = verify(source, None, None)
    assert not report.sound
    assert any(each.check == "form" and EXPERT in each.detail for each in report.findings)


def test_a_layer_left_out_of_the_quantisation_is_sound(tmp_path: Path) -> None:
    def first_layer_plain(name: str, shape: tuple[int, int]) -> Tensors:
        return plain(name, shape) if "layers.0" in name else packed(name, shape)

    source = write(tmp_path / "model", CONFIG, {**dense(), **trunk(linear=first_layer_plain)})
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    assert verify(tmp_path / "out", str(source), None).findings == ()
    assert unsound_experts(open_model(str(source))) == {}


NAN, INF = float("nan"), float("inf")
SCALES: dict[str, tuple[str, Callable[[], object], str]] = {
    "zero": ("weight_scale_2", lambda: number(0.0), "is zero"),
    "NaN": ("weight_scale_2", lambda: number(NAN), "1 of 1 values that are NaN or infinite"),
    "infinite": ("input_scale", lambda: number(INF), "1 of 1 values that are NaN or infinite"),
    "minus infinite": ("input_scale", lambda: number(-INF), "1 of 1 values"),
    "all zero": ("weight_scale", lambda: ("F8_E4M3", (8, 1), bytes(8)), "is zero"),
    "all NaN": ("weight_scale", lambda: ("F8_E4M3", (8, 1), b"\x7f" * 8), "8 of 8 values"),
}


def nvfp4_model(folder: Path, changes: Tensors) -> Path:
    tensors = {**dense(), **trunk(linear=nvfp4), **changes}
    return write(folder, W4A4, tensors)


@pytest.mark.parametrize("case", SCALES)
def test_scales_without_a_usable_value_are_named(case: str, tmp_path: Path) -> None:
    part, make, message = SCALES[case]
    name = f"{EXPERT}.gate_proj.{part}"
    changes = {name: make()}
    if part == "weight_scale_2":
        changes[f"{EXPERT}.up_proj.{part}"] = make()
    source = nvfp4_model(tmp_path / "model", changes)  # type: ignore[arg-type]
    report = verify(source, None, None)
    assert not report.sound
    assert any(each.check == "scales" and name in each.detail and message in each.detail for each in report.findings)
    # The plan drops the expert: what is left is sound.
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    assert verify(tmp_path / "out", str(source), None).findings == ()
    job = make_job(open_model(str(source)), plan(tmp_path / "keeps.json", KEEPS), OPTIONS)
    assert any(name in doubt.what for doubt in job.doubts)
    assert list(unsound_experts(open_model(str(source)))) == [(0, 6)]


def test_a_nan_among_others_is_a_warning(tmp_path: Path) -> None:
    name = f"{EXPERT}.gate_proj.weight_scale"
    report = verify(nvfp4_model(tmp_path / "model", {name: ("F8_E4M3", (8, 1), b"\x38" * 7 + b"\xff")}), None, None)
    assert report.sound
    assert [each.severity for each in report.findings if each.check == "scales"] == ["warning"]
    report = verify(nvfp4_model(tmp_path / "zero", {name: ("F8_E4M3", (8, 1), b"\x38" * 7 + b"\x00")}), None, None)
    assert not [each for each in report.findings if each.check == "scales"]


def test_gate_and_up_with_other_scales_are_named(tmp_path: Path) -> None:
    source = nvfp4_model(tmp_path / "model", {f"{EXPERT}.up_proj.weight_scale_2": number(0.25)})
    report = verify(source, None, None)
    assert report.sound
    (only,) = [each for each in report.findings if each.check == "scales"]
    assert f"{EXPERT}.gate_proj.weight_scale_2 differs" in only.detail
    assert list(unsound_experts(open_model(str(source)))) == [(0, 6)]


def test_w4a4_without_any_input_scale_is_named(tmp_path: Path) -> None:
    tensors = {name: entry for name, entry in trunk(linear=nvfp4).items() if not name.endswith("input_scale")}
    report = verify(write(tmp_path / "model", W4A4, {**dense(), **tensors}), None, None)
    assert [each.severity for each in report.findings if "no expert has an input scale" in each.detail] == ["error"]
    weight_only = {**CONFIG, "quantization_config": {"quant_algo": "W4A16_NVFP4"}}
    report = verify(write(tmp_path / "a16", weight_only, {**dense(), **tensors}), None, None)
    assert report.sound
    activations = {"config_groups": {"g": {"input_activations": {"num_bits": 4}}}}
    config = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", **activations}}
    assert not verify(write(tmp_path / "ct", config, {**dense(), **tensors}), None, None).sound


def test_an_expert_without_a_scale_is_named(tmp_path: Path) -> None:
    tensors = {**dense(), **trunk(linear=nvfp4)}
    del tensors[f"{EXPERT}.down_proj.input_scale"]
    source = write(tmp_path / "model", W4A4, tensors)
    assert unsound_experts(open_model(str(source))) == {(0, 6): f"{EXPERT} lacks down_proj.input_scale"}


@pytest.mark.parametrize(
    ("dtype", "bits", "special", "zeros"),
    [
        ("BF16", [0x7F80, 0xFF80, 0x7FC0, 0x0000, 0x8000, 0x3F80], 3, 2),
        ("F16", [0x7C00, 0xFC00, 0x7E00, 0x0000, 0x8000, 0x3C00], 3, 2),
        ("F8_E4M3", [0x7F, 0xFF, 0x7E, 0x00, 0x80, 0x38], 2, 2),
        ("F8_E5M2", [0x7C, 0x7D, 0xFC, 0x00, 0x80, 0x3C], 3, 2),
        ("F8_E8M0", [0xFF, 0x00, 0x7F], 1, 0),
    ],
)
def test_special_values_of_each_dtype(dtype: str, bits: list[int], special: int, zeros: int) -> None:
    """Bit patterns from the standards: IEEE 754 for half, and OCP's for 8 bits, where E4M3 has no infinity."""
    from reap_serve.prune.scales import _count

    code = "<H" if dtype in ("BF16", "F16") else "<B"
    counts = _count(dtype, memoryview(b"".join(struct.pack(code, each) for each in bits)))
    assert counts is not None
    assert np.array_equal(counts, [special, zeros, len(bits)])


def test_kept_experts_are_untouched(tmp_path: Path) -> None:
    tensors = {**dense(), **trunk(linear=mixed(packed, ""))}
    source = write(tmp_path / "model", CONFIG, tensors)
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    written = read(tmp_path / "out")
    for new, old in enumerate(KEPT[0]):
        name = "model.layers.0.mlp.experts.{}.up_proj.weight_packed"
        assert written[name.format(new)][2] == tensors[name.format(old)][2]
