"""The patched rotary embedding against vLLM's plain PyTorch one, in place, on 2-D, 3-D and strided tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

T, HEADS, SIZE = 7, 3, 16


@pytest.fixture
def engine_settings() -> Iterator[None]:
    """Layers ask for the engine's configuration when they are built."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def patched(load_patched: Callable[[str, str], ModuleType]) -> ModuleType:
    return load_patched("0002-cpu-rope-by-head.patch", "vllm/model_executor/layers/rotary_embedding/base.py")


def tensors(shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of random numbers; strided ones are parts of larger tensors, as in latent attention."""
    draw = torch.Generator().manual_seed(0)
    if shape == "2-D":
        return torch.randn(T, HEADS * SIZE, generator=draw), torch.randn(T, SIZE, generator=draw)
    if shape == "3-D":
        return torch.randn(T, HEADS, SIZE, generator=draw), torch.randn(T, 1, SIZE, generator=draw)
    query = torch.randn(T, HEADS, 5 + SIZE, generator=draw)[..., 5:]
    return query, torch.randn(T, 9 + SIZE, generator=draw)[..., 9:].unsqueeze(1)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [SIZE, SIZE // 2])
@pytest.mark.parametrize("shape", ["2-D", "3-D", "strided"])
@pytest.mark.usefixtures("engine_settings")
def test_it_is_the_plain_one_and_in_place(patched: ModuleType, shape: str, rotary_dim: int, is_neox: bool) -> None:
    rope = patched.RotaryEmbedding(SIZE, rotary_dim, 64, 10000.0, is_neox, torch.float32)
    positions = torch.tensor([0, 1, 2, 5, 9, 33, 63])
    query, key = tensors(shape)
    expected_query, expected_key = rope.forward_native(positions, query.contiguous(), key.contiguous())
    before = (query.clone(), key.clone())
    found_query, found_key = rope.forward_cpu(positions, query, key)
    torch.testing.assert_close(found_query, expected_query)
    torch.testing.assert_close(found_key, expected_key)
    assert (found_query.data_ptr(), found_key.data_ptr()) == (query.data_ptr(), key.data_ptr())
    assert not torch.equal(query, before[0])
    assert not torch.equal(key, before[1])


@pytest.mark.usefixtures("engine_settings")
def test_a_query_alone_and_positions_by_sequence(patched: ModuleType) -> None:
    rope = patched.RotaryEmbedding(SIZE, SIZE, 64, 10000.0, True, torch.float32)
    query = torch.randn(2, 4, HEADS * SIZE)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    expected, _ = rope.forward_native(positions, query.clone())
    found, key = rope.forward_cpu(positions, query)
    torch.testing.assert_close(found, expected)
    assert key is None


@pytest.mark.usefixtures("engine_settings")
def test_the_installed_one_has_the_defect() -> None:
    """Fails when vLLM has mended it: the patch's Remove-when."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    rope = RotaryEmbedding(SIZE, SIZE, 64, 10000.0, True, torch.float32)
    query, key = tensors("3-D")
    expected, _ = rope.forward_native(torch.arange(T), query.clone(), key.clone())
    found, _ = rope.forward_cpu(torch.arange(T), query, key)
    assert (found - expected).abs().max() > 0.5
