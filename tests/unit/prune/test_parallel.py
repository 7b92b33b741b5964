"""Tensor-parallel shapes: widths out of every layout and packing, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from small_checkpoint import write_checkpoint

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import known_architectures
from reap_serve.architectures.spec import RoutingLimits
from reap_serve.prune.parallel import ExpertShape, expert_shape, inspect_parallel
from reap_serve.prune.verify import verify
from reap_serve.records import JsonValue
from reap_serve.weight_headers import Tensor

EXPERTS, HIDDEN, WIDTH = 4, 256, 96

# family, tensors of layer 0 by name: (dtype, shape); the experts are 96 wide behind a router of 256 in each.
LAYOUTS: Mapping[str, tuple[str, Mapping[str, tuple[str, tuple[int, ...]]]]] = {
    "bf16": (
        "qwen3_moe",
        {
            "mlp.gate.weight": ("BF16", (EXPERTS, HIDDEN)),
            "mlp.experts.0.gate_proj.weight": ("BF16", (WIDTH, HIDDEN)),
            "mlp.experts.0.down_proj.weight": ("BF16", (HIDDEN, WIDTH)),
            "mlp.experts.0.down_proj.weight_scale_inv": ("F32", (2, 1)),
        },
    ),
    "stacked": (
        "qwen3_5_moe",
        {
            "mlp.gate.weight": ("BF16", (EXPERTS, HIDDEN)),
            "mlp.experts.gate_up_proj": ("BF16", (EXPERTS, 2 * WIDTH, HIDDEN)),
            "mlp.experts.down_proj": ("BF16", (EXPERTS, HIDDEN, WIDTH)),
        },
    ),
    "mxfp4": (
        "gpt_oss",
        {
            "mlp.router.weight": ("BF16", (EXPERTS, HIDDEN)),
            "mlp.experts.gate_up_proj_blocks": ("U8", (EXPERTS, 2 * WIDTH, HIDDEN // 32, 16)),
            "mlp.experts.gate_up_proj_scales": ("U8", (EXPERTS, 2 * WIDTH, HIDDEN // 32)),
            "mlp.experts.gate_up_proj_bias": ("BF16", (EXPERTS, 2 * WIDTH)),
            "mlp.experts.down_proj_blocks": ("U8", (EXPERTS, HIDDEN, WIDTH // 32, 16)),
            "mlp.experts.down_proj_bias": ("BF16", (EXPERTS, HIDDEN)),
        },
    ),
    "awq": (
        "mixtral",
        {
            "block_sparse_moe.gate.weight": ("F16", (EXPERTS, HIDDEN)),
            "block_sparse_moe.experts.0.w1.qweight": ("I32", (HIDDEN, WIDTH // 8)),
            "block_sparse_moe.experts.0.w1.qzeros": ("I32", (2, WIDTH // 8)),
            "block_sparse_moe.experts.0.w2.scales": ("F16", (1, HIDDEN)),
        },
    ),
    "latent": (
        "nemotron_h",
        {
            "mixer.gate.weight": ("BF16", (EXPERTS, 2 * HIDDEN)),
            "mixer.experts.0.up_proj.weight": ("BF16", (WIDTH, HIDDEN)),
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_width_is_found_in_every_layout(layout: str) -> None:
    family, shapes = LAYOUTS[layout]
    architecture = known_architectures()[family]
    root = architecture.layers[0].format(layer=0)
    tensors = [Tensor(f"{root}.{name}", "f", dtype, shape, 0, 0) for name, (dtype, shape) in shapes.items()]
    text: dict[str, JsonValue] = {"moe_latent_size": HIDDEN}
    found = expert_shape(tensors, TensorNames(architecture, 1), text, [], architecture.expert_hidden_keys)
    assert found == ExpertShape((WIDTH,), 1)


@pytest.mark.parametrize(
    ("quantization", "granularity"),
    [
        (None, 1),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, 32),
        ({"config_groups": {"group_0": {"weights": {"group_size": 16}, "input_activations": {"group_size": 48}}}}, 16),
        ({"config_groups": {"group_0": {"weights": {"block_structure": [128, 128], "group_size": None}}}}, 128),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, 16),
        ({"quant_method": "gptq", "group_size": -1}, 1),
    ],
)
def test_the_granularity_is_found_in_every_configuration(quantization: JsonValue, granularity: int) -> None:
    names = TensorNames(known_architectures()["qwen3_moe"], 1)
    assert expert_shape([], names, {}, [quantization], ()) == ExpertShape((), granularity)


@pytest.mark.parametrize(
    ("shape", "experts", "ranks", "expected"),
    [
        (ExpertShape((768,), 128), 64, 2, []),
        (ExpertShape((768,), 128), 64, 4, ["error: experts are 768 wide: the 192 of one of 4"]),
        (ExpertShape((96, 100), 1), 64, 8, ["error: experts are 100 wide: 8 tensor-parallel ranks cannot"]),
        (ExpertShape((768,), 1), 6, 8, ["error: 8 tensor-parallel ranks for 6 experts", "warning: 6 experts"]),
        (ExpertShape((768,), 1), 90, 4, ["warning: 90 experts: with expert parallelism 4 ranks"]),
    ],
)
def test_what_cannot_be_shared_is_named(shape: ExpertShape, experts: int, ranks: int, expected: list[str]) -> None:
    limits = RoutingLimits(experts, 2, 1, 1, (0, 1))
    found = [f"{each.severity}: {each.detail}" for each in inspect_parallel(shape, limits, ranks)]
    assert len(found) == len(expected)
    assert all(detail.startswith(beginning) for detail, beginning in zip(found, expected, strict=True))


def test_verify_checks_it_on_request(tmp_path: Path) -> None:
    """The small checkpoint's experts have 6 bytes, two values each, behind a router of 2: 6 wide."""
    model = write_checkpoint(tmp_path / "model")
    checks = {finding.check for finding in verify(model, None, None).findings}
    assert "parallel" not in checks
    details = [each.detail for each in verify(model, None, None, ranks=4).findings if each.check == "parallel"]
    assert details == ["experts are 6 wide: 4 tensor-parallel ranks cannot share that"]
