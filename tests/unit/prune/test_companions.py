"""What lies beside the weights: carried, or left out and named; and what makes odd files and names survive."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from odd_checkpoint import CONFIG, QWEN35, dense, plan, read, tensor, trunk, write
from small_checkpoint import safetensors_bytes

from reap_serve.cli.app import main
from reap_serve.errors import InputFileError, ReapServeError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import PruneResult, prune
from reap_serve.prune.verify import verify

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
LORA = {
    f"base_model.model.model.layers.0.mlp.experts.{e}.up_proj.lora_A.weight": tensor("a", "BF16", 4, 16) for e in (0, 7)
}


def model(folder: Path, shards: int = 2) -> Path:
    return write(folder / "model", CONFIG, {**dense(), **trunk()}, shards)


def pruned(folder: Path) -> PruneResult:
    return prune(str(folder / "model"), plan(folder / "plan.json"), folder / "out", OPTIONS, overwrite=False)


def weights(path: Path, name: str = "other") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(safetensors_bytes({name: tensor(name, "BF16", 4)}))


@pytest.mark.parametrize("folder", ["", "lora/"])
def test_an_adapter_does_not_go_along(folder: str, tmp_path: Path) -> None:
    source = model(tmp_path)
    (source / folder).mkdir(exist_ok=True)
    (source / f"{folder}adapter_config.json").write_text('{"peft_type": "LORA"}')
    (source / f"{folder}adapter_model.safetensors").write_bytes(safetensors_bytes(LORA))
    result = pruned(tmp_path)
    assert result.left_out == (f"{folder}adapter_config.json", f"{folder}adapter_model.safetensors")
    assert not list((tmp_path / "out").rglob("adapter*"))
    assert verify(tmp_path / "out", str(source), None).findings == ()


def test_an_adapter_beside_files_without_an_index_is_no_part_of_the_model(tmp_path: Path) -> None:
    source = model(tmp_path, shards=1)
    (source / "model.safetensors").rename(source / "weights.safetensors")
    (source / "adapter_model.safetensors").write_bytes(safetensors_bytes(LORA))
    (source / "adapter_config.json").write_text("{}")
    assert pruned(tmp_path).left_out == ("adapter_config.json", "adapter_model.safetensors")


def test_weights_in_folders_go_along_unless_they_hold_experts(tmp_path: Path) -> None:
    source = model(tmp_path)
    weights(source / "audio_tokenizer" / "model.safetensors")
    (source / "audio_tokenizer" / "config.json").write_text("{}")
    weights(source / "original" / "model-1.safetensors", "model.layers.0.mlp.experts.3.up_proj.weight")
    (source / "original" / "model.safetensors.index.json").write_text("{}")
    (source / "original" / "params.json").write_text("{}")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"x")
    result = pruned(tmp_path)
    assert result.left_out == (
        "onnx/model.onnx",
        "original/model-1.safetensors",
        "original/model.safetensors.index.json",
    )
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*/*")} == {
        "audio_tokenizer/config.json",
        "audio_tokenizer/model.safetensors",
        "original/params.json",
    }
    assert verify(tmp_path / "out", str(source), None).findings == ()


def test_weights_that_no_loader_reads_are_named(tmp_path: Path) -> None:
    source = model(tmp_path)
    for name in ("model.safetensors", "mtp.safetensors"):
        weights(source / name)
    for name in ("mm_projector.bin", "pytorch_model.bin", "consolidated.00.pth"):
        (source / name).write_bytes(b"\x80\x02")
    assert pruned(tmp_path).left_out == (
        "consolidated.00.pth",
        "mm_projector.bin",
        "model.safetensors",
        "mtp.safetensors",
        "pytorch_model.bin",
    )


def test_what_the_configuration_promises_and_the_weights_lack(tmp_path: Path) -> None:
    root = "model.language_model"
    config = {**QWEN35, "vision_config": {"depth": 2}, "audio_config": {"layers": 1}}
    source = write(tmp_path / "model", config, {**dense(root), **trunk(root)})
    report = verify(source, None, None)
    assert report.sound
    promised = [each.detail for each in report.findings if each.check == "promised"]
    assert len(promised) == 3
    assert all(any(key in detail for detail in promised) for key in ("vision_config", "audio_config", "mtp_num_hidden"))
    towers = {"model.visual.blocks.0.x": tensor("v", "BF16", 2), "audio_tower.y": tensor("a", "BF16", 2)}
    draft = {"mtp.fc.weight": tensor("f", "BF16", 2)}
    whole = write(tmp_path / "whole", config, {**dense(root), **trunk(root), **towers, **draft})
    assert not [each for each in verify(whole, None, None).findings if each.check == "promised"]
    keys = {"model_type": "glm4_moe", "n_routed_experts": 8, "first_k_dense_replace": 0, "num_nextn_predict_layers": 1}
    report = verify(write(tmp_path / "draft", {**CONFIG, **keys}, {**dense(), **trunk()}), None, None)
    assert ["num_nextn_predict_layers 1" in each.detail for each in report.findings if each.check == "promised"] == [
        True
    ]


CARDS = {
    "open list": b"---\nlicense: [\n---\n# A model\n",
    "two colons": b"---\nlicense: other: see below\n---\n",
    "tab": b"---\nlicense:\tmit\n\ttags: x\n---\n",
    "python tag": b"---\nlicense: !!python/name:os.getcwd\n---\n",
    "NUL": b"---\nlicense: mit\x00\n---\n",
    "Latin-1": "---\nlicense: caf\xe9\n---\n".encode("latin-1"),
    "a list": b"---\n- license\n- mit\n---\n",
    "odd types": b"---\nlicense: {a: [1, {b: 2}]}\nlanguage: 2026-01-01\n---\n",
    "empty": b"",
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_that_cannot_be_read_does_not_stop_a_prune(case: str, tmp_path: Path) -> None:
    (model(tmp_path) / "README.md").write_bytes(CARDS[case])
    pruned(tmp_path)
    assert "# model, 4 of 8 experts" in (tmp_path / "out" / "README.md").read_text()


def test_a_name_of_250_letters_and_of_300(tmp_path: Path) -> None:
    source = model(tmp_path)
    for overwrite in (False, True):
        output = tmp_path / ("a" * 250)
        prune(str(source), plan(tmp_path / "plan.json"), output, OPTIONS, overwrite=overwrite)
        assert len(read(output)) == 2 * (1 + 12) + 3
    with pytest.raises(InputFileError, match="300 bytes"):
        prune(str(source), tmp_path / "plan.json", tmp_path / ("\xe9" * 150), OPTIONS, overwrite=False)
    assert {path.name[:1] for path in tmp_path.iterdir()} == {"a", "m", "p"}


@pytest.mark.parametrize("name", ["my models/x y", "org/", "a/b c", "-x/y", "caf\xe9/model", "x/" + "y" * 200])
def test_a_path_that_is_no_name_of_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="does not exist"):
        prune(name, plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)


def test_a_file_that_cannot_be_compared_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path)
    pruned(tmp_path)

    def refuse(left: Path, right: Path, shallow: bool) -> bool:
        raise PermissionError(13, "Permission denied", str(left))

    monkeypatch.setattr("filecmp.cmp", refuse)
    report = verify(tmp_path / "out", str(source), None)
    assert report.sound
    assert [each.detail for each in report.findings] == [
        f"tokenizer.json was not compared: {source / 'tokenizer.json'} cannot be read: Permission denied"
    ]


def stale_index(source: Path) -> None:
    for shard in source.glob("model-*.safetensors"):
        shard.unlink()
    (source / "model.safetensors").write_bytes(safetensors_bytes({**dense(), **trunk()}))


def consolidated(source: Path) -> None:
    for shard in source.glob("model-*.safetensors"):
        shard.rename(source / shard.name.replace("model-", "consolidated-"))
    (source / "model.safetensors.index.json").rename(source / "consolidated.safetensors.index.json")


def only_small(source: Path) -> None:
    for path in source.glob("model*"):
        path.unlink()


def one_missing(source: Path) -> None:
    next(source.glob("model-*.safetensors")).unlink()


def pointers(source: Path) -> None:
    for shard in source.glob("model-*.safetensors"):
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def other_counts(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_experts_per_layer": [8, 6]}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (stale_index, "delete model.safetensors.index.json"),
        (consolidated, "only consolidated"),
        (only_small, "no weight file, only small files"),
        (one_missing, "download the missing files"),
        (pointers, "git lfs pull"),
        (other_counts, "cannot be cut again"),
    ],
)
def test_remedies_help(change: object, what: str, tmp_path: Path) -> None:
    assert callable(change)
    change(model(tmp_path))
    with pytest.raises(ReapServeError) as caught:
        pruned(tmp_path)
    assert caught.value.exit_code == 2
    assert what in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command_names_what_it_leaves_out_and_cuts_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path)
    (source / "mm_projector.bin").write_bytes(b"x")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(LORA))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reap-serve", "prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    code, out, err = run(source, plan(tmp_path / "plan.json"), tmp_path / "out", "--json")
    assert (code, json.loads(out)["left_out"]) == (0, ["mm_projector.bin"])
    assert "warning: mm_projector.bin is left out" in err
    code, out, _ = run(source, tmp_path / "plan.json", tmp_path / "cut", "--adapter", adapter, "--json")
    document = json.loads(out)
    assert (code, document["changed"], document["tensors"], document["dropped"]) == (0, True, 2, 0)
    everything = plan(tmp_path / "all.json", {0: range(8), 1: range(8)})
    code, out, _ = run(source, everything, tmp_path / "same", "--adapter", adapter)
    assert code == 0
    assert "needs no change" in out
    assert not (tmp_path / "same").exists()
    code, _, err = run(source, everything, tmp_path / "same", "--adapter", adapter, "--low-disk")
    assert (code, err.startswith("error: --adapter")) == (2, True)


RECIPE = """
quant_stage:
  quant_modifiers:
    QuantizationModifier:
      targets: [Linear]
      scheme: W4A16
      ignore: [{ignored}]
"""


@pytest.mark.parametrize(
    ("ignored", "stays"),
    [
        ("lm_head, 're:.*mlp.gate$', 're:.*self_attn.*'", True),
        ("'re:.*experts.*'", True),
        ("model.layers.0.mlp.experts.0.up_proj", True),  # keeps its number
        ("lm_head, model.layers.0.mlp.experts.7.up_proj", False),  # is renumbered
        ("model.layers.1.mlp.experts.0.up_proj", False),  # is dropped
        ("'re:.*experts.[0-3].up_proj'", False),  # selects others
    ],
)
def test_a_recipe_goes_along_where_it_says_the_same_after_the_cut(
    ignored: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path)
    (source / "recipe.yaml").write_text(RECIPE.format(ignored=ignored))
    command = ["reap-serve", "prune", source, plan(tmp_path / "plan.json"), tmp_path / "out", "--json"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr()
    assert json.loads(shown.out)["left_out"] == ([] if stays else ["recipe.yaml"])
    said = "warning: recipe.yaml is left out: it names experts by the numbers that they had"
    assert (said in shown.err) is not stays
    assert (tmp_path / "out" / "recipe.yaml").exists() is stays
    assert verify(tmp_path / "out", str(source), None).findings == ()


@pytest.mark.parametrize("text", ["a: &a [b]\nc: *a\n", "{", "\x00", "a: " + "[" * 2000])
def test_a_recipe_that_cannot_be_read_stays_behind(text: str, tmp_path: Path) -> None:
    (model(tmp_path) / "recipe.yaml").write_text(text)
    assert pruned(tmp_path).left_out == ("recipe.yaml",)
