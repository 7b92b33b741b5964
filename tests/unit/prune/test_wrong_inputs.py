"""Wrong, corrupt and hostile inputs: one line, exit 2, and nothing is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoint import CONFIG, layer_tensors, safetensors_bytes, write_checkpoint, write_plan

from reap_serve.errors import MismatchError, PlanError, ReapServeError
from reap_serve.model import fingerprint, open_model
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 2)
KEPT = {0: [1, 3], 1: [0, 2]}


def without(name: str) -> Callable[[Path], None]:
    return lambda source: (source / name).unlink()


def truncated(source: Path) -> None:
    file = source / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def configured(**changes: object) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    return change


def linked_out(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        target = source.parent / "secret"
        if (source / name).exists():
            shutil.move(source / name, target)
        else:
            target.write_text("{}")
        (source / name).symlink_to(target)

    return change


def indexed(**changes: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"].update(changes)
        path.write_text(json.dumps(index))

    return change


def with_tensor(name: str, shape: tuple[int, ...] = (2,)) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = {
            **layer_tensors(1),
            name: ("U8", shape, bytes(math.prod(shape))),
            "lm_head.weight": ("BF16", [1, 2], b"head"),
        }
        (source / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(tensors))

    return change


def without_tensor(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        tensors = {**layer_tensors(1), "lm_head.weight": ("BF16", [1, 2], b"head")}
        del tensors[name]
        (source / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(tensors))
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        del index["weight_map"][name]
        path.write_text(json.dumps(index))

    return change


def by_hqq(module: str) -> Callable[[Path], None]:
    """As HQQ writes a linear map: packed values, and what describes them in tensors of their own."""

    def change(source: Path) -> None:
        tensors = {**layer_tensors(1), "lm_head.weight": ("BF16", [1, 2], b"head")}
        for name in [name for name in tensors if module in name]:
            del tensors[name]
            plain = name.removesuffix("weight")
            tensors[f"{plain}W_q"] = ("U8", [3], bytes(3))
            tensors |= {f"{plain}{part}": ("I32", [1], bytes(4)) for part in ("axis", "group_size", "nbits", "scale")}
        (source / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(tensors))
        (source / "model.safetensors.index.json").unlink()

    return change


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "experts by HQQ": (by_hqq(".experts."), "prune the model that the checkpoint was quantised from"),
    "routers by HQQ": (by_hqq("mlp.gate."), "mlp.gate.W_q: experts and routers quantised by HQQ cannot be pruned"),
    "no config": (without("config.json"), "config.json does not exist"),
    "no shard": (without("model-00002-of-00002.safetensors"), "does not exist"),
    "truncated shard": (truncated, "truncated"),
    "dense model": (configured(model_type="llama"), "not a Mixture-of-Experts family"),
    "experts without number": (configured(num_experts=None), "names no routed experts"),
    "two counts": (configured(num_local_experts=8), "contradicts itself"),
    "another count": (configured(num_experts=8), "counts 4 experts, the model 8"),
    "2**60 layers": (configured(num_hidden_layers=2**60), "outside 1..10000"),
    "2**60 experts": (configured(num_experts=2**60), "outside 0..100000"),
    "top-k beyond the experts": (configured(num_experts_per_tok=5), "outside 0..4"),
    "a layer more": (configured(num_hidden_layers=3), "the plan names 2 layers"),
    "a layer that config.json calls dense": (configured(mlp_only_layers=[1]), "the plan names 2 layers"),
    "shard linked out": (linked_out("model-00002-of-00002.safetensors"), "a link out of the checkpoint"),
    "index linked out": (linked_out("model.safetensors.index.json"), "a link out of the checkpoint"),
    "config linked out": (linked_out("config.json"), "a link out of the checkpoint"),
    "tokenizer linked out": (linked_out("tokenizer.json"), "a link out of the checkpoint"),
    "index leads out": (indexed(x="../secret.safetensors"), "names the file"),
    "index with an absolute path": (indexed(x="/etc/secret.safetensors"), "names the file"),
    "index with a foreign tensor": (indexed(x="model-00001-of-00002.safetensors"), "which lacks it"),
    "index with a tensor name that leads out": (indexed(**{"../x": "model-00001-of-00002.safetensors"}), "not allowed"),
    "unknown router tensor": (with_tensor("model.layers.1.mlp.gate.extra"), "unknown to the family"),
    "surplus expert": (with_tensor("model.layers.1.mlp.experts.4.gate_proj.weight"), "has expert 4"),
    "expert with a leading zero": (
        with_tensor("model.layers.1.mlp.experts.01.gate_proj.weight"),
        "unknown to the family",
    ),
    "stacked and single experts": (with_tensor("model.layers.1.mlp.experts.gate_up_proj", (4, 1)), "both stacked"),
    "missing expert weight": (without_tensor("model.layers.1.mlp.experts.3.up_proj.weight"), "lacks up_proj.weight"),
    "missing router": (without_tensor("model.layers.1.mlp.gate.weight"), "has 0 routers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_are_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    source = write_checkpoint(home / "source")
    plan = write_plan(home / "plan.json", KEPT)
    change, message = WRONG[case]
    change(source)
    before = sorted(home.rglob("*"))
    with pytest.raises(ReapServeError, match=message) as caught:
        prune(str(source), plan, home / "deeper" / "out", OPTIONS, overwrite=False)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ({0: [1, 3], 1: [0, 1, 2]}, PlanError, "between 2 and 3 experts"),
        ({0: [1], 1: [0]}, PlanError, "chooses 2 per token"),
        ({0: [1, 3]}, MismatchError, "names 1 layers"),
        ({0: [1, 3], 2: [0, 2]}, MismatchError, "names 2 layers"),
    ],
)
def test_plans_that_do_not_fit(
    kept: dict[int, list[int]], error: type[ReapServeError], message: str, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "source")
    with pytest.raises(error, match=message):
        prune(str(source), write_plan(tmp_path / "plan.json", kept), tmp_path / "out", OPTIONS, overwrite=False)
    assert not (tmp_path / "out").exists()


def test_a_plan_with_the_fingerprint_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    plan_path = write_plan(tmp_path / "plan.json", KEPT)
    plan = json.loads(plan_path.read_text())
    plan["model"] = fingerprint(open_model(str(source))).model_dump()
    plan_path.write_text(json.dumps(plan))
    prune(str(source), plan_path, tmp_path / "out", OPTIONS, overwrite=False)
    plan["model"]["weights_sha256"] = "0" * 64
    plan_path.write_text(json.dumps(plan))
    with pytest.raises(MismatchError, match="weights_sha256"):
        prune(str(source), plan_path, tmp_path / "other", OPTIONS, overwrite=False)


def test_the_hub_cache_with_its_links_into_blobs_is_read(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    source = write_checkpoint(cache / "snapshots" / "abc")
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    prune(str(source), write_plan(tmp_path / "plan.json", KEPT), tmp_path / "out", OPTIONS, overwrite=False)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts", "model.layers.0.attention", "transformer.h.0.mlp.experts", "0", ""]
)
def test_a_plan_that_calls_its_layers_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "source")
    plan = write_plan(tmp_path / "plan.json", KEPT)
    document = json.loads(plan.read_text())
    document["layers"][0]["layer"] = name
    plan.write_text(json.dumps(document))
    with pytest.raises(MismatchError, match="layer of index 0"):
        prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.{}.mlp", "language_model.model.layers.{}.mlp.experts"])
def test_a_plan_may_call_its_layers_as_vllm_does(tmp_path: Path, name: str) -> None:
    source = write_checkpoint(tmp_path / "source")
    plan = write_plan(tmp_path / "plan.json", KEPT)
    document = json.loads(plan.read_text())
    for layer in document["layers"]:
        layer["layer"] = name.format(layer["index"])
    plan.write_text(json.dumps(document))
    result = prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    assert result.experts_after == len(KEPT[0])


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("layer 0", True),
        ("model.layers.0.mlp.experts", True),
        ("layer 1", False),
        ("first", False),
        ("model.layers.1.mlp.experts", False),
        ("encoder.0.mlp", False),
    ],
)
def test_a_plan_by_hand_may_call_its_layers_by_number(name: str, fits: bool, tmp_path: Path) -> None:
    source, path = write_checkpoint(tmp_path / "source"), write_plan(tmp_path / "plan.json", KEPT)
    plan = json.loads(path.read_text())
    plan["layers"][0]["layer"] = name
    path.write_text(json.dumps(plan))
    if fits:
        prune(str(source), path, tmp_path / "out", OPTIONS, overwrite=False)
        return
    with pytest.raises(MismatchError, match="layer of index 0"):
        prune(str(source), path, tmp_path / "out", OPTIONS, overwrite=False)
