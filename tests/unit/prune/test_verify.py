"""Each defect that stock vLLM would not notice, made by hand, is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoint import Entry, read_back, safetensors_bytes, write_checkpoint, write_plan

from reap_serve.errors import InputFileError, MismatchError, RequestError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify

KEPT = {0: [1, 3], 1: [0, 2]}
FILE = "model-00002-of-00002.safetensors"
EXPERT = "model.layers.1.mlp.experts"


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source")
    plan = write_plan(tmp_path / "plan.json", KEPT)
    prune(str(source), plan, tmp_path / "out", PruneOptions(MtpChoice.CUT, 1 << 30, 1), overwrite=False)
    return tmp_path / "out"


def test_what_prune_writes_is_sound(pruned: Path) -> None:
    assert verify(pruned, None, None).model_dump() == {"sound": True, "findings": ()}
    assert verify(pruned, str(pruned.parent / "source"), None).findings == ()
    assert verify(pruned, str(pruned.parent / "source"), pruned.parent / "plan.json").findings == ()


def changed(change: Callable[[dict[str, Entry]], None], *, reindex: bool = True) -> Callable[[Path], None]:
    """Rewrites the second file, and the index with it."""

    def apply(out: Path) -> None:
        tensors = read_back(out / FILE)
        change(tensors)
        (out / FILE).write_bytes(safetensors_bytes(tensors))
        if reindex:
            path = out / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            names = {name: file for name, file in index["weight_map"].items() if file != FILE}
            index["weight_map"] = {**names, **dict.fromkeys(tensors, FILE)}
            held = [*tensors.values(), *read_back(out / FILE.replace("00002-of", "00001-of")).values()]
            index["metadata"]["total_size"] = sum(len(data) for _, _, data in held)
            path.write_text(json.dumps(index))

    return apply


def edit_json(name: str, **changes: object) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **changes}))

    return apply


def swap_rows(tensors: dict[str, Entry]) -> None:
    name = "model.layers.1.mlp.gate.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[4:] + data[:4])


def flip_a_bit(tensors: dict[str, Entry]) -> None:
    name = f"{EXPERT}.1.down_proj.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[:-1] + bytes([data[-1] ^ 1]))


def swap_experts(tensors: dict[str, Entry]) -> None:
    first, second = f"{EXPERT}.0.up_proj.weight", f"{EXPERT}.1.up_proj.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]


def lose_a_scale(tensors: dict[str, Entry]) -> None:
    tensors[f"{EXPERT}.0.up_proj.input_scale"] = ("F32", [], bytes(4))


def reshape(tensors: dict[str, Entry]) -> None:
    _, _, data = tensors[f"{EXPERT}.1.up_proj.weight"]
    tensors[f"{EXPERT}.1.up_proj.weight"] = ("U8", [3, 2], data)


def wrong_total(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))


def truncate(out: Path) -> None:
    (out / FILE).write_bytes((out / FILE).read_bytes()[:-1])


def ignore_a_gone_expert(out: Path) -> None:
    edit_json("config.json", quantization_config={"quant_method": "fp8", "ignore": [f"{EXPERT}.3.up_proj"]})(out)


ALONE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing expert": (changed(lambda tensors: _drop(tensors, f"{EXPERT}.1.")), "missing", "experts.1 lacks"),
    "missing projection": (changed(lambda tensors: _drop(tensors, f"{EXPERT}.1.up")), "missing", "up_proj.weight"),
    "surplus expert": (
        changed(lambda tensors: tensors.update({f"{EXPERT}.2.up_proj.weight": ("U8", [2, 3], bytes(6))})),
        "surplus",
        "experts.2",
    ),
    "missing router": (changed(lambda tensors: _drop(tensors, "model.layers.1.mlp.gate")), "router", "layer 1 has 0"),
    "router of the base": (
        changed(lambda tensors: tensors.update({"model.layers.1.mlp.gate.weight": ("BF16", [4, 2], bytes(16))})),
        "rows",
        "[4, 2]",
    ),
    "an expert without its scale": (changed(lose_a_scale), "scales", "experts.1 lacks up_proj.input_scale"),
    "shapes differ": (changed(reshape), "shapes", "up_proj.weight"),
    "stale alias": (edit_json("config.json", num_local_experts=4), "config", "contradicts itself"),
    "stale count": (edit_json("config.json", num_experts=4), "rows", "4 expected"),
    "top-k beyond": (edit_json("config.json", num_experts_per_tok=3), "config", "num_experts_per_tok is 3"),
    "wrong total_size": (wrong_total, "total_size", "states"),
    "not in the index": (
        changed(lambda tensors: tensors.update({"extra": ("U8", [1], b"x")}), reindex=False),
        "index",
        "extra first",
    ),
    "gone from the file": (changed(lambda tensors: _drop(tensors, "lm_head"), reindex=False), "files", "lm_head"),
    "truncated": (truncate, "files", "truncated"),
    "no shard": (lambda out: (out / FILE).unlink(), "files", "does not exist"),
    "stale ignore entry": (ignore_a_gone_expert, "quantization", f"{EXPERT}.3.up_proj"),
    "manifest broken": (lambda out: (out / "reap_manifest.json").write_text("{}"), "manifest", "not a valid manifest"),
    "another cut in the manifest": (
        edit_json("reap_manifest.json", layers=[{"index": 0, "old_ids": [0, 3]}, {"index": 1, "old_ids": [0, 3]}]),
        "manifest",
        "layer 0 does not hold the experts that the plan keeps",
    ),
}


def _drop(tensors: dict[str, Entry], beginning: str) -> None:
    for name in [name for name in tensors if name.startswith(beginning)]:
        del tensors[name]


@pytest.mark.parametrize("case", ALONE)
def test_defects_that_show_without_the_source(case: str, pruned: Path) -> None:
    change, check, detail = ALONE[case]
    change(pruned)
    report = verify(pruned, None, None)
    assert not report.sound
    assert any(
        each.severity == "error" and each.check == check and detail in each.detail for each in report.findings
    ), report.findings


AGAINST_SOURCE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a bit flipped": (changed(flip_a_bit), "bytes", f"{EXPERT}.1.down_proj.weight differs from {EXPERT}.2.down_proj"),
    "experts swapped": (changed(swap_experts), "bytes", "up_proj"),
    "router rows swapped": (changed(swap_rows), "bytes", "mlp.gate.weight"),
    "a tensor more": (changed(lambda tensors: tensors.update({"x": ("U8", [1], b"x")})), "surplus", "x is in no way"),
    "a tensor less": (changed(lambda tensors: _drop(tensors, "lm_head")), "missing", "lm_head.weight"),
    "config edited": (edit_json("config.json", rope_theta=1.0), "config", "rope_theta"),
}


@pytest.mark.parametrize("case", AGAINST_SOURCE)
def test_defects_that_show_only_beside_the_source(case: str, pruned: Path) -> None:
    change, check, detail = AGAINST_SOURCE[case]
    change(pruned)
    assert verify(pruned, None, None, read_bytes=False).sound is (case != "config edited")
    report = verify(pruned, str(pruned.parent / "source"), pruned.parent / "plan.json")
    assert not report.sound
    assert any(each.check == check and detail in each.detail for each in report.findings), report.findings


@pytest.mark.parametrize("case", [case for case in AGAINST_SOURCE if case != "config edited"])
def test_altered_tensors_show_by_their_digests(case: str, pruned: Path) -> None:
    AGAINST_SOURCE[case][0](pruned)
    report = verify(pruned, None, None)
    assert not report.sound
    assert {each.check for each in report.findings} == {"bytes"}


def test_verify_says_what_it_did_not_check(pruned: Path) -> None:
    flip = changed(flip_a_bit)
    flip(pruned)
    (only,) = verify(pruned, None, None, read_bytes=False).findings
    assert (only.severity, only.check) == ("warning", "bytes")
    assert "were not read" in only.detail
    manifest = json.loads((pruned / "reap_manifest.json").read_text())
    assert len(manifest["digests"]) == 18
    del manifest["digests"]  # as 0.1 wrote it
    (pruned / "reap_manifest.json").write_text(json.dumps(manifest))
    (only,) = verify(pruned, None, None).findings
    assert (only.severity, only.check) == ("warning", "bytes")
    assert "18 tensors were compared with nothing" in only.detail


def test_a_key_below_the_text_configuration_is_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    nested = {
        "model_type": "qwen3_5_moe",
        "text_config": {**config, "model_type": "qwen3_5_moe_text", "rope": {"t": 1}},
    }
    (source / "config.json").write_text(json.dumps(nested))
    plan = write_plan(tmp_path / "plan.json", KEPT)
    prune(str(source), plan, tmp_path / "out", PruneOptions(MtpChoice.CUT, 1 << 30, 1), overwrite=False)
    assert verify(tmp_path / "out", str(source), None).findings == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["text_config"]["rope"]["t"] = 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    (only,) = verify(tmp_path / "out", str(source), None).findings
    assert only.detail == "config.json: text_config.rope.t is 2, and not 1, which the source and the plan give"


def test_numbers_that_json_cannot_hold_are_written_strictly_and_sound(tmp_path: Path) -> None:
    """Mamba's `time_step_limit` is [0, Infinity] in published configurations."""
    source = write_checkpoint(tmp_path / "source")
    text = (source / "config.json").read_text().rstrip("}")
    (source / "config.json").write_text(f'{text}, "a": NaN, "b": [0.0, Infinity, -Infinity], "c": "x\\ud83d"}}')
    plan = write_plan(tmp_path / "plan.json", KEPT)
    prune(str(source), plan, tmp_path / "out", PruneOptions(MtpChoice.CUT, 1 << 30, 1), overwrite=False)
    written = (tmp_path / "out" / "config.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    config = json.loads(written, parse_constant=refuse)
    assert (config["a"], config["b"], config["c"]) == (None, [0.0, float("inf"), float("-inf")], "x\ud83d")
    assert verify(tmp_path / "out", str(source), plan).findings == ()


def test_an_old_sidecar_is_warned_of(pruned: Path) -> None:
    (pruned / "reap_router.sidecar").rename(pruned / "reap_router.safetensors")
    edit_json("reap_manifest.json", files=None, config=None)(pruned)  # as 0.1 wrote it
    report = verify(pruned, None, None)
    assert report.sound
    assert [each.check for each in report.findings] == ["sidecar", "files"]


def test_another_source_and_another_plan_are_noticed(pruned: Path, tmp_path: Path) -> None:
    other = write_plan(tmp_path / "other.json", {0: [0, 1], 1: [0, 1]})
    report = verify(pruned, str(tmp_path / "source"), other)
    assert not report.sound
    assert {each.check for each in report.findings} == {"manifest", "bytes"}
    (tmp_path / "source" / "tokenizer.json").write_text("changed")
    report = verify(pruned, str(tmp_path / "source"), None)
    assert report.sound
    assert [(each.severity, each.check) for each in report.findings] == [("warning", "files")]
    with pytest.raises(MismatchError):
        verify(pruned, str(tmp_path / "source"), write_plan(tmp_path / "short.json", {0: [0, 1]}))


def test_wrong_requests(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputFileError):
        verify(tmp_path / "nowhere", None, None)
    with pytest.raises(RequestError, match="without --source"):
        verify(pruned, None, tmp_path / "plan.json")
    (pruned / "reap_manifest.json").unlink()
    assert [each.severity for each in verify(pruned, None, None).findings] == ["warning", "warning"]
    with pytest.raises(RequestError, match="to take the plan from"):
        verify(pruned, str(tmp_path / "source"), None)
