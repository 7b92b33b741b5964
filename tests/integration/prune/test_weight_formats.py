"""Quantised experts are cut as bytes: what stays is identical, and dequantised computes what the masked base does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

from masked_base import masked  # noqa: E402
from pruned_pairs import Pair, make_pair  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_families import NUM_EXPERTS  # noqa: E402
from weight_formats import FORMATS, dequantize_checkpoint, mxfp4_checkpoint, quantize_checkpoint  # noqa: E402

from reap_serve.prune.verify import verify  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def _logits(path: Path, dropped: dict[int, Sequence[int]] | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if dropped is None:
            return model(tokens).logits
        with masked(model, dropped, NUM_EXPERTS):
            return model(tokens).logits


def _bytes_of(directory: Path) -> dict[str, bytes]:
    tensors = load_file(directory / "model.safetensors")
    return {name: bytes(tensor.reshape(-1).view(torch.uint8).numpy()) for name, tensor in tensors.items()}


def _require_same_bytes(pair: Pair) -> None:
    """An oracle beside `verify`: expert by expert, read with safetensors' own reader."""
    before, after = _bytes_of(pair.base), _bytes_of(pair.pruned)
    for layer, kept in pair.kept.items():
        for new, old in enumerate(kept):
            here = {name: data for name, data in after.items() if f"layers.{layer}.mlp.experts.{new}." in name}
            assert here
            for name, data in here.items():
                assert data == before[name.replace(f"experts.{new}.", f"experts.{old}.")]


@pytest.mark.parametrize("fraction_dropped", [0.25, 0.5])
@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "fp8-block"), *(("qwen3_moe", name) for name in FORMATS)])
def test_quantised_experts(
    family: str, name: str, fraction_dropped: float, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Bytes are kept, and the dequantised pruned model equals the dequantised masked base to 1e-5."""
    form = FORMATS[name]
    base = tmp_path / "base"
    quantize_checkpoint(tiny_checkpoint(family), base, form)
    pair = make_pair(base, tmp_path, fraction_dropped)
    assert not [each for each in verify(pair.pruned, str(base), None).findings if each.severity == "error"]
    _require_same_bytes(pair)
    dequantize_checkpoint(base, tmp_path / "base-float", form)
    dequantize_checkpoint(pair.pruned, tmp_path / "pruned-float", form)
    expected = _logits(tmp_path / "base-float", dict(pair.dropped))
    torch.testing.assert_close(_logits(tmp_path / "pruned-float"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fraction_dropped", [0.25, 0.5])
def test_mxfp4_gpt_oss(fraction_dropped: float, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The six stacked tensors of gpt-oss are cut on the experts' axis; transformers dequantises both checkpoints."""
    base = tmp_path / "base"
    mxfp4_checkpoint(tiny_checkpoint("gpt_oss"), base)
    pair = make_pair(base, tmp_path, fraction_dropped)
    assert not [each for each in verify(pair.pruned, str(base), None).findings if each.severity == "error"]
    before, after = load_file(base / "model.safetensors"), load_file(pair.pruned / "model.safetensors")
    for layer, kept in pair.kept.items():
        sliced = [name for name in after if f"layers.{layer}.mlp." in name]
        assert len(sliced) == 8
        for name in sliced:
            assert torch.equal(after[name], before[name][list(kept)])
    quantization = transformers.Mxfp4Config(dequantize=True)

    def load(path: Path) -> torch.nn.Module:
        # Dequantising gives bfloat16 weights, where base and pruned would round differently and a tie would fall
        # either way; as float32 they are the same numbers.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", quantization_config=quantization
        )
        return model.float()

    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    base_model, pruned_model = load(base), load(pair.pruned)
    with torch.no_grad(), masked(base_model, pair.dropped, NUM_EXPERTS):
        expected = base_model(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned_model(tokens).logits, expected, rtol=0, atol=1e-5)
