"""Engines whose statistics would be wrong are refused, each with its remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from reap_serve.adapter import engine_view
from reap_serve.adapter.refusals import refuse_unsound
from reap_serve.errors import EngineError
from reap_serve.record.settings import ObserveSettings


def config(speculative: object = None, **parallel: object) -> Any:
    settings: dict[str, object] = {
        "enable_eplb": False,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
    }
    return SimpleNamespace(speculative_config=speculative, parallel_config=SimpleNamespace(**(settings | parallel)))


@pytest.mark.parametrize(
    ("vllm_config", "reason"),
    [
        (config(speculative=object()), "rejected draft tokens"),
        (config(enable_eplb=True), "without --enable-eplb"),
        (config(data_parallel_size=2), "data parallel size 2 .* merge their statistics"),
        (config(pipeline_parallel_size=2), "pipeline parallel size 2: .* without pipeline parallelism"),
    ],
)
def test_layouts_that_cannot_be_observed(monkeypatch: pytest.MonkeyPatch, vllm_config: Any, reason: str) -> None:
    monkeypatch.setattr(engine_view, "device_type", lambda: "cpu")
    layers: Any = [object()]
    with pytest.raises(EngineError, match=reason):
        refuse_unsound(ObserveSettings(), vllm_config, layers)


@pytest.mark.parametrize(
    ("settings", "ranks", "reason"),
    [
        (ObserveSettings(recorder="moe_sum", extra_sums=("output_sum",)), 1, "moe_sum recorder collects no optional"),
        (ObserveSettings(extra_sums=("logit_gram",)), 2, "tensor parallel size 2"),
    ],
)
def test_optional_sums_that_would_be_partial(
    monkeypatch: pytest.MonkeyPatch, settings: ObserveSettings, ranks: int, reason: str
) -> None:
    monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config: False)
    layers: Any = [object()]
    with pytest.raises(EngineError, match=reason):
        refuse_unsound(settings, config(tensor_parallel_size=ranks), layers)


def test_a_dense_model() -> None:
    with pytest.raises(EngineError, match="no fused MoE layer"):
        refuse_unsound(ObserveSettings(), config(), [])


@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_python_recorders_under_graphs(monkeypatch: pytest.MonkeyPatch, recorder: str) -> None:
    monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config: True)
    layers: Any = [object()]
    with pytest.raises(EngineError, match=f"the {recorder} recorder sees nothing; .*--enforce-eager.*moe_sum"):
        refuse_unsound(ObserveSettings(recorder=recorder), config(), layers)
