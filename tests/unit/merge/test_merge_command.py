"""A merge from statistics to a checkpoint on disk, held against averages of the source's tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from statistics_factory import header

from reap_serve.errors import ArchitectureError, OutputExistsError, RequestError
from reap_serve.merge.grouping import group_layers
from reap_serve.merge.record import MERGE_NAME
from reap_serve.merge.run import MergeRequest, merge
from reap_serve.merge.signature import layer_signatures
from reap_serve.model import fingerprint, open_model
from reap_serve.prune.verify import verify
from reap_serve.statistics.record import ExpertSums, Statistics

NUM_EXPERTS, NUM_LAYERS, HIDDEN, UNITS, TOP_K = 6, 2, 8, 4, 2


def write_model(directory: Path, dtype: torch.dtype, stacked: bool = False) -> Path:
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": random(16, HIDDEN), "lm_head.weight": random(16, HIDDEN)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        tensors[f"{prefix}.gate.weight"] = random(NUM_EXPERTS, HIDDEN)
        for expert in range(NUM_EXPERTS):
            for name, shape in (("gate", (UNITS, HIDDEN)), ("up", (UNITS, HIDDEN)), ("down", (HIDDEN, UNITS))):
                tensors[f"{prefix}.experts.{expert}.{name}_proj.weight"] = random(*shape)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": NUM_LAYERS,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def statistics_of(model: Path) -> Statistics:
    """Random sums of two slices with all optional ones."""
    random = np.random.default_rng(1)
    shape = (2, 2, NUM_LAYERS, NUM_EXPERTS)
    counts = random.integers(1, 50, shape)
    logits = random.normal(size=(*shape[:3], 9, NUM_EXPERTS))
    positive = [random.random(shape) for _ in range(7)]
    return Statistics(
        header(fingerprint(open_model(str(model))), ("a", "b")),
        ExpertSums(
            counts,
            *positive,
            output_sum_SPLEH=random.normal(size=(*shape, HIDDEN)),
            logit_gram_SPLEE=np.einsum("splte,spltf->splef", logits, logits),
        ),
        counts.sum(axis=3) // TOP_K,
    )


def request(method: str, **changes: object) -> MergeRequest:
    return MergeRequest(**{"method": method, "keep_experts": 3, "mix": {}, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_average_of_its_group(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_model(tmp_path / "model", dtype)
    statistics = statistics_of(model)
    result = merge(str(model), statistics, tmp_path / "out", request("hc-smoe"), overwrite=False)
    assert (result.experts_before, result.experts_after) == (NUM_EXPERTS, 3)
    source, found = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    layers = group_layers(layer_signatures(statistics), "hc-smoe", 3)
    assert result.experts_averaged == sum(len(group.members) > 1 for groups in layers for group in groups)
    checked = 0
    for index, groups in enumerate(layers):
        prefix = f"model.layers.{index}.mlp"
        dominant = [group.dominant for group in groups]
        torch.testing.assert_close(found[f"{prefix}.gate.weight"], source[f"{prefix}.gate.weight"][dominant])
        for new_id, group in enumerate(groups):
            for name in ("gate_proj", "up_proj", "down_proj"):
                members = [source[f"{prefix}.experts.{member}.{name}.weight"].double() for member in group.members]
                mean = sum(weight * member for weight, member in zip(group.weights, members, strict=True))
                assert isinstance(mean, torch.Tensor)
                torch.testing.assert_close(
                    found[f"{prefix}.experts.{new_id}.{name}.weight"], mean.to(dtype), rtol=1e-6, atol=1e-7
                )
                checked += 1
    assert checked == NUM_LAYERS * 3 * 3
    assert set(found) == {name for name in source if ".experts." not in name} | {
        f"model.layers.{index}.mlp.experts.{new_id}.{name}.weight"
        for index in range(NUM_LAYERS)
        for new_id in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize("method", ["m-smoe", "hc-smoe", "ream"])
def test_verify_finds_the_structure_sound(tmp_path: Path, method: str) -> None:
    model = write_model(tmp_path / "model", torch.bfloat16)
    merge(str(model), statistics_of(model), tmp_path / "out", request(method), overwrite=False)
    report = verify(tmp_path / "out", None, None)
    assert report.sound, report.findings
    assert not {"files", "sidecar", "bytes"} & {finding.check for finding in report.findings}
    record = json.loads((tmp_path / "out" / MERGE_NAME).read_text())
    members = [member for expert in record["layers"][0]["experts"] for member in expert["members"]]
    assert sorted(members) == list(range(NUM_EXPERTS))
    assert "merged by" in (tmp_path / "out" / "README.md").read_text()


def test_a_slice_can_be_weighted_away(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", torch.float32)
    statistics = statistics_of(model)
    pooled, only_a = layer_signatures(statistics), layer_signatures(statistics, {"a": 1.0})
    expected = (
        statistics.sums.output_sum_SPLEH[0].sum(axis=0) / statistics.sums.token_count_SPLE[0].sum(axis=0)[..., None]
    )  # type: ignore[index]
    np.testing.assert_allclose([layer.mean_output_EH for layer in only_a], expected)
    assert not np.allclose(pooled[0].mean_output_EH, only_a[0].mean_output_EH)  # type: ignore[arg-type]


def test_wrong_requests_write_nothing(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", torch.float32)
    statistics = statistics_of(model)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"):
        merge(str(model), statistics, tmp_path / "there", request("hc-smoe"), overwrite=False)
    with pytest.raises(RequestError, match="router chooses 2 per token"):
        merge(str(model), statistics, tmp_path / "out", request("hc-smoe", keep_experts=1), overwrite=False)
    assert not (tmp_path / "out").exists()


def test_quantised_experts_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", torch.float8_e4m3fn)
    with pytest.raises(ArchitectureError, match=r"is F8_E4M3: averages of quantised experts .* bfloat16 or float32"):
        merge(str(model), statistics_of(model), tmp_path / "out", request("hc-smoe"), overwrite=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(RequestError, match=r"is quantised .*bfloat16 or float32"):
        merge(str(model), statistics_of(model), tmp_path / "out", request("hc-smoe"), overwrite=False)
    assert not (tmp_path / "out").exists()
