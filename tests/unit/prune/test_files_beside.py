"""Every kind of small file beside the weights, damaged, edited, removed or added: named, by what it does to serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoint import CONFIG, read_back, safetensors_bytes, write_checkpoint, write_plan

from reap_serve.prune.compare_config import compare_values, config_values
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.manifest import read_manifest
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify

KEPT = {0: [1, 3], 1: [0, 2]}
SIDECAR = "reap_router.sidecar"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    config = {**CONFIG, "rope_theta": 1e6, "quantization_config": {"quant_method": "fp8", "ignore": ["lm_head"] * 30}}
    source = write_checkpoint(folder / "source", config)
    (source / "tokenizer_config.json").write_text('{"model_max_length": 4096}')
    (source / "merges.txt").write_text("a b\n")
    (source / "hf_quant_config.json").write_text('{"quantization": {"exclude_modules": ["lm_head"]}}')
    (source / "README.md").write_text("the source's card")
    (source / "audio").mkdir()
    (source / "audio" / "codec.safetensors").write_bytes(safetensors_bytes({"codec": ("U8", [4], b"tone")}))
    plan = write_plan(folder / "plan.json", KEPT)
    prune(str(source), plan, folder / "out", PruneOptions(MtpChoice.CUT, 1 << 30, 1), overwrite=False)
    return folder


@pytest.fixture
def pruned(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def edit(name: str, **changes: object) -> Change:
    def apply(out: Path) -> None:
        (out / name).write_text(json.dumps({**json.loads((out / name).read_text()), **changes}))

    return apply


def write(name: str, content: bytes) -> Change:
    return lambda out: (out / name).write_bytes(content) and None


def remove(name: str) -> Change:
    return lambda out: (out / name).unlink()


def shorten(name: str) -> Change:
    return lambda out: (out / name).write_bytes((out / name).read_bytes()[:-1]) and None


def flip(name: str) -> Change:
    def apply(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[-1] ^= 1
        (out / name).write_bytes(content)

    return apply


def forget(*keys: str) -> Change:
    return lambda out: edit("reap_manifest.json", **dict.fromkeys(keys))(out)


ERRORS: dict[str, tuple[Change, str, str]] = {
    "a token edited": (write("tokenizer.json", b"[]"), "files", "tokenizer.json has other bytes"),
    "tokenizer truncated": (shorten("tokenizer.json"), "files", "tokenizer.json has 1 bytes, and had 2"),
    "tokenizer gone": (remove("tokenizer.json"), "files", "tokenizer.json, which was"),
    "merges edited": (flip("merges.txt"), "files", "merges.txt"),
    "template gone": (remove("chat_template.jinja"), "files", "chat_template.jinja, which was"),
    "sampling defaults gone": (remove("generation_config.json"), "files", "generation_config.json, which was"),
    "code edited": (flip("modeling_own.py"), "files", "modeling_own.py"),
    "code gone": (remove("modeling_own.py"), "files", "modeling_own.py"),
    "weights in a folder": (flip("audio/codec.safetensors"), "files", "audio/codec.safetensors has other bytes"),
    "quantisation edited": (edit("hf_quant_config.json", quantization={}), "files", "hf_quant_config.json"),
    "sidecar gone": (remove(SIDECAR), "sidecar", f"{SIDECAR}, which was"),
    "sidecar truncated": (shorten(SIDECAR), "sidecar", "bytes, and had"),
    "sidecar altered": (flip(SIDECAR), "sidecar", "has other bytes"),
    "a directory in its place": (lambda out: (remove(SIDECAR)(out), (out / SIDECAR).mkdir())[1], "sidecar", SIDECAR),
    "rope": (edit("config.json", rope_theta=5e6), "config", "rope_theta is 5000000, and was 1000000 when it was"),
    "fewer experts a token": (edit("config.json", num_experts_per_tok=1), "config", "num_experts_per_tok is 1"),
    "a key more": (edit("config.json", sliding_window=9), "config", "sliding_window is 9, and was absent"),
    "a long value": (edit("config.json", quantization_config={}), "config", "quantization_config is not what it was"),
}
WARNINGS: dict[str, tuple[Change, str]] = {
    "template edited": (write("chat_template.jinja", b"{{ other }}"), "chat_template.jinja has 11 bytes, and had 14"),
    "tokenizer's configuration": (edit("tokenizer_config.json", a=1), "tokenizer_config.json has"),
    "sampling defaults": (edit("generation_config.json", temperature=0), "generation_config.json has"),
    "licence edited": (write("LICENSE", b"other"), "LICENSE has"),
    "licence gone": (remove("LICENSE"), "LICENSE, which was"),
    "template added": (write("chat_template.json", b"{}"), "chat_template.json was added"),
    "quantisation added": (write("quant_config.json", b"{}"), "quant_config.json was added"),
}
SILENT: dict[str, Change] = {
    "the model card": write("README.md", b"mine"),
    "no model card": remove("README.md"),
    "a note": write("NOTES.txt", b"mine"),
    "a hidden file": write(".gitattributes", b"* -text"),
    "config.json in other words": lambda out: edit("config.json", rope_theta=1000000, transformers_version="9")(out),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_changes_what_is_served_is_an_error(case: str, pruned: Path) -> None:
    change, check, detail = ERRORS[case]
    change(pruned)
    (only,) = verify(pruned, None, None).findings
    assert (only.severity, only.check) == ("error", check)
    assert detail in only.detail
    beside_source = verify(pruned, str(pruned.parent / "source"), None)
    assert not beside_source.sound
    assert {each.check for each in beside_source.findings} == {check}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_users_edit_is_a_warning(case: str, pruned: Path) -> None:
    change, detail = WARNINGS[case]
    change(pruned)
    for source in (None, str(pruned.parent / "source")):
        (only,) = verify(pruned, source, None).findings
        assert (only.severity, only.check) == ("warning", "files")
        assert detail in only.detail


@pytest.mark.parametrize("case", SILENT)
def test_what_nothing_reads_is_not_said(case: str, pruned: Path) -> None:
    SILENT[case](pruned)
    assert verify(pruned, None, None).findings == ()


def test_the_manifest_holds_the_digest_of_each_file(pruned: Path) -> None:
    files = read_manifest(pruned).files
    assert files is not None
    assert set(files) == {
        *("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "modeling_own.py"),
        *("tokenizer_config.json", "merges.txt", "hf_quant_config.json", "audio/codec.safetensors", SIDECAR),
    }
    for name, written in files.items():
        content = (pruned / name).read_bytes()
        assert (written.num_bytes, written.digest) == (len(content), xxhash.xxh3_64_hexdigest(content))


def test_headers_only_reads_small_files_and_the_size_of_weights(pruned: Path) -> None:
    flip("audio/codec.safetensors")(pruned)
    flip("tokenizer.json")(pruned)
    unread, tokenizer = verify(pruned, None, None, read_bytes=False).findings[::-1]
    assert (unread.check, tokenizer.detail) == ("bytes", "tokenizer.json has other bytes than when it was written")
    shorten("audio/codec.safetensors")(pruned)
    assert len(verify(pruned, None, None, read_bytes=False).findings) == 3


def test_older_manifests_are_read_and_the_report_says_what_was_not_compared(pruned: Path) -> None:
    forget("files", "config")(pruned)
    edit("config.json", rope_theta=1.0)(pruned)
    (only,) = verify(pruned, None, None).findings
    assert (only.severity, only.check) == ("warning", "files")
    assert "compared with nothing" in only.detail
    edit("config.json", rope_theta=1e6, num_experts_per_tok=1)(pruned)
    first, second = verify(pruned, None, None).findings
    assert (first, second.severity) == (only, "error")
    assert second.detail == "config.json chooses 1 experts for a token, and 2 when it was written"
    edit("config.json", num_experts_per_tok=2)(pruned)
    shorten(SIDECAR)(pruned)
    assert [each.check for each in verify(pruned, None, None).findings if each.severity == "error"] == ["sidecar"]
    remove(SIDECAR)(pruned)
    assert [each.check for each in verify(pruned, None, None).findings] == ["files", "sidecar"]
    assert verify(pruned, str(pruned.parent / "source"), None).findings == ()


@pytest.mark.parametrize("has_digests", [True, False])
def test_the_sidecar_is_compared_with_the_source(has_digests: bool, pruned: Path) -> None:
    tensors = read_back(pruned / SIDECAR)
    name = "model.layers.0.mlp.gate.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, data[::-1])
    (pruned / SIDECAR).write_bytes(safetensors_bytes(tensors))
    if not has_digests:
        forget("files", "config")(pruned)
    (only,) = verify(pruned, str(pruned.parent / "source"), None).findings
    assert (only.severity, only.check) == ("error", "sidecar")
    assert has_digests or only.detail == f"{SIDECAR}: {name} differs from {name} of the source"


@pytest.mark.parametrize("name", ["../plan.json", "/dev/zero"])
def test_a_manifest_cannot_lead_out_of_the_checkpoint(name: str, pruned: Path) -> None:
    files = json.loads((pruned / "reap_manifest.json").read_text())["files"]
    edit("reap_manifest.json", files={**files, name: {"num_bytes": 1, "digest": ""}})(pruned)
    (only,) = verify(pruned, None, None).findings
    assert (only.check, only.detail) == (
        "manifest",
        f"reap_manifest.json names {name}, which is outside the checkpoint",
    )


def test_many_changed_values_are_counted() -> None:
    found = list(compare_values(config_values({}), {f"k{number}": number for number in range(8)}))
    assert len(found) == 6
    assert found[-1].detail == "config.json: 3 more values are not as they were written"


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=100)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), trees, max_size=4))
def test_a_configuration_has_its_own_values(config: dict[str, object]) -> None:
    """Also with infinite numbers and halves of surrogate pairs, and after it was written and read."""
    values = config_values(config)  # type: ignore[arg-type]
    assert list(compare_values(values, json.loads(json.dumps(config)))) == []
    assert json.loads(json.dumps(values)) == values


@settings(deadline=None)
@given(st.sampled_from([1, 0, True, None, "1", 1.5, [1], {"b": 1}]), st.sampled_from([2, False, "x", 2.5, [True], {}]))
def test_another_value_is_another_value(before: object, after: object) -> None:
    found = list(compare_values(config_values({"text": {"a": before}}), {"text": {"a": after}}))  # type: ignore[dict-item]
    assert found
    assert all(each.detail.startswith("config.json: text.a") for each in found)
