"""Engines whose statistics would be wrong are refused, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from reap_serve.adapter import engine_view, layer_view, refusals
from reap_serve.adapter.offline import start_engine
from reap_serve.adapter.refusals import refuse_unsound
from reap_serve.errors import EngineError, RequestError
from reap_serve.record.settings import ObserveSettings


def config(speculative: object = None, **parallel: object) -> Any:
    settings: dict[str, object] = {
        "enable_eplb": False,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "tensor_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "all2all_backend": "allgather_reducescatter",
        "use_ubatching": False,
    }
    fast_prefill = parallel.pop("kv_sharing_fast_prefill", False)
    return SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(**(settings | parallel)),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
    )


PLAIN, SUMS = ObserveSettings(), ObserveSettings(extra_sums=("output_sum",))
INLINE, AT_SUM = ObserveSettings(recorder="inline"), ObserveSettings(recorder="moe_sum")


@pytest.mark.parametrize(
    ("settings", "vllm_config", "reason"),
    [
        (AT_SUM, config(speculative=object()), "before sampling tells .* without speculative decoding"),
        (SUMS, config(speculative=object()), "do not wait for draft tokens"),
        (PLAIN, config(speculative=object(), pipeline_parallel_size=2), "only the last stage"),
        (AT_SUM, config(enable_eplb=True), "without --enable-eplb"),
        (INLINE, config(data_parallel_size=2), "data parallel size 2 cannot; leave --recorder out"),
        (SUMS, config(data_parallel_size=2), "optional sums .* data parallel size 2"),
        (PLAIN, config(data_parallel_size=2, tensor_parallel_size=2), "was never tried"),
        (
            PLAIN,
            config(data_parallel_size=2, all2all_backend="deepep_low_latency"),
            "--all2all-backend allgather_re",
        ),
        (PLAIN, config(data_parallel_size=2, use_ubatching=True), "without --enable-dbo"),
        (
            PLAIN,
            config(data_parallel_size=2),
            r"2 cannot be observed: .*; apply patches/.*0006.*, or serve with one engine",
        ),
        (PLAIN, config(prefill_context_parallel_size=2), "prefill context parallel size 2"),
        (PLAIN, config(kv_sharing_fast_prefill=True), "fast prefill .* without --kv-sharing-fast-prefill"),
        (PLAIN, config(pipeline_parallel_size=2), "pipeline parallel size 2: .* without pipeline parallelism"),
    ],
)
def test_layouts_that_cannot_be_observed(
    monkeypatch: pytest.MonkeyPatch, settings: ObserveSettings, vllm_config: Any, reason: str
) -> None:
    monkeypatch.setattr(engine_view, "device_type", lambda: "cpu")
    monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config: False)
    monkeypatch.setattr(engine_view, "traces_graphs", lambda vllm_config: False)
    layers: Any = [object()]
    with pytest.raises(EngineError, match=reason):
        refuse_unsound(settings, vllm_config, layers)


def test_ranks_meet_in_eager_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: Any = [object()]
    for graphs, reason in ((True, "inside CUDA graphs"), (False, "a compiled model")):
        monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config, graphs=graphs: graphs)
        monkeypatch.setattr(engine_view, "traces_graphs", lambda vllm_config: True)
        with pytest.raises(EngineError, match=f"{reason}.*; start vLLM with --enforce-eager"):
            refuse_unsound(PLAIN, config(data_parallel_size=2), layers)


def test_several_engines_need_a_server() -> None:
    source: Any = None
    with pytest.raises(RequestError, match=r"data_parallel_size 2: .* or send the traffic by reap-serve replay"):
        start_engine(source, PLAIN, {"data_parallel_size": 2})


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


class Kernel:
    """A kernel that adds rows where nothing can be read."""


class Layer(SimpleNamespace):
    """A layer that nothing is wrong with, but for what a test changes."""

    def __init__(self, *, monolithic: bool = False, **change: object) -> None:
        method = SimpleNamespace(is_monolithic=monolithic, moe_kernel=SimpleNamespace(fused_experts=Kernel()))
        plain: dict[str, object] = {
            "layer_name": "model.layers.0.mlp.experts",
            "router": object(),
            "routed_experts": SimpleNamespace(quant_method=method, expert_map=None),
            "routed_output_transform": None,
        }
        super().__init__(**(plain | change))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], None]:
    """Stands on a device, with graphs or without; families and their defects are another test's."""

    def stand(device: str, graphs: bool) -> None:
        from vllm.platforms import current_platform

        monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config: graphs)
        monkeypatch.setattr(engine_view, "device_type", lambda: device)
        monkeypatch.setattr(layer_view, "routes_in_model", lambda layer: False)
        monkeypatch.setattr(refusals, "refuse_misrouted_layers", lambda vllm_config, layers: None)
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: device == "cpu")

    return stand


# What is refused, and the same engine after the remedy was followed: (device, graphs, settings, layer).
Case = tuple[str, bool, ObserveSettings, Layer]
AUTO = ObserveSettings()
REMEDIES: list[tuple[Case, str, Case]] = [
    (
        ("cuda", True, ObserveSettings(recorder="inline"), Layer()),
        "the inline recorder sees nothing; leave --recorder out, or add --enforce-eager",
        ("cuda", True, AUTO, Layer()),
    ),
    (
        ("cuda", True, ObserveSettings(recorder="inline"), Layer()),
        "--enforce-eager",
        ("cuda", False, ObserveSettings(recorder="inline"), Layer()),
    ),
    (
        ("cuda", True, ObserveSettings(extra_sums=("logit_gram",)), Layer()),
        "sums its logits; add --enforce-eager",
        ("cuda", False, ObserveSettings(extra_sums=("logit_gram",)), Layer()),
    ),
    (
        ("cuda", True, ObserveSettings(recorder="moe_sum"), Layer()),
        "its kernel, Kernel, shows no rows before it adds them; leave --recorder out",
        ("cuda", True, AUTO, Layer()),
    ),
    (
        ("cuda", True, ObserveSettings(recorder="moe_sum", overhead_budget=0.02), Layer()),
        "no budget of 0.02 holds; add --overhead-budget none, or leave --recorder out",
        ("cuda", True, ObserveSettings(overhead_budget=0.02), Layer()),
    ),
    (
        ("cpu", False, ObserveSettings(recorder="moe_sum"), Layer()),
        "and this is a CPU; leave --recorder out",
        ("cpu", False, AUTO, Layer()),
    ),
    (
        ("cuda", False, ObserveSettings(recorder="moe_sum", extra_sums=("output_sum",)), Layer()),
        "collects no optional sums; leave --recorder out",
        ("cuda", False, ObserveSettings(extra_sums=("output_sum",)), Layer()),
    ),
    # That vLLM takes a modular kernel then is tried with its own selection: test_kernel_selection.
    (
        ("cuda", True, ObserveSettings(keep_kernel=True), Layer(monolithic=True)),
        "inside a monolithic kernel .Kernel., .*; leave --keep-kernel out",
        ("cuda", True, AUTO, Layer()),
    ),
    (
        ("cuda", True, AUTO, Layer(monolithic=True)),
        "leave --moe-backend out",
        ("cuda", True, AUTO, Layer()),
    ),
    (
        ("cpu", False, AUTO, Layer(monolithic=True)),
        "observe the checkpoint that it was quantised from",
        ("cpu", False, AUTO, Layer()),
    ),
]


@pytest.mark.parametrize(("refused", "reason", "followed"), REMEDIES)
def test_a_refused_engine_is_accepted_when_its_remedy_is_followed(
    on: Callable[[str, bool], None], refused: Case, reason: str, followed: Case
) -> None:
    device, graphs, settings, layer = refused
    layers: Any = [layer]
    on(device, graphs)
    with pytest.raises(EngineError, match=reason):
        refuse_unsound(settings, config(), layers)
    device, graphs, settings, layer = followed
    on(device, graphs)
    layers = [layer]
    refuse_unsound(settings, config(), layers)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_never_refused_for_its_recorder(on: Callable[[str, bool], None], device: str, graphs: bool) -> None:
    on(device, graphs)
    layers: Any = [Layer()]
    refuse_unsound(AUTO, config(), layers)
    refuse_unsound(ObserveSettings(extra_sums=("output_sum", "coselection_count")), config(), layers)
