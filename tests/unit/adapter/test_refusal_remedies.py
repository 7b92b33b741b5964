"""Each refused engine is built, its remedy is followed, and then it is accepted."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from refusable_engine import Engine, Layer, config

from reap_serve.adapter.refusals import refuse_untold_drafts
from reap_serve.errors import EngineError
from reap_serve.record.settings import ObserveSettings

INLINE, DEFERRED, AT_SUM = (ObserveSettings(recorder=name) for name in ("inline", "deferred", "moe_sum"))
SUMS, GRAM = ObserveSettings(extra_sums=("output_sum",)), ObserveSettings(extra_sums=("logit_gram",))
REDUCES = Layer(reduces=True)
DRAFTS = object()


def speculative(**parallel: object) -> Any:
    """vLLM's configuration with draft tokens."""
    return config(speculative=DRAFTS, **parallel)


def ranks(**parallel: object) -> Any:
    """vLLM's configuration of two data-parallel ranks."""
    return config(data_parallel_size=2, **parallel)


# What is refused, how, and the same engine after each of the remedies that are named.
REMEDIES: dict[str, tuple[Engine, str, tuple[Engine, ...]]] = {
    "inline under graphs": (
        Engine(settings=INLINE),
        "the inline recorder sees nothing; leave --recorder out, or add --enforce-eager",
        (Engine(), Engine(graphs=False, settings=INLINE)),
    ),
    "logits under graphs": (
        Engine(settings=GRAM),
        "sums its logits; add --enforce-eager",
        (Engine(graphs=False, settings=GRAM),),
    ),
    "moe_sum at a kernel that hides its rows": (
        Engine(settings=AT_SUM),
        "its kernel, Kernel, shows no rows before it adds them; leave --recorder out",
        (Engine(),),
    ),
    "moe_sum under a budget": (
        Engine(settings=ObserveSettings(recorder="moe_sum", overhead_budget=0.02), layer=REDUCES),
        "no budget of 0.02 holds; add --overhead-budget none, or leave --recorder out",
        (Engine(settings=AT_SUM, layer=REDUCES), Engine(settings=ObserveSettings(overhead_budget=0.02))),
    ),
    "moe_sum on a CPU": (
        Engine("cpu", graphs=False, settings=AT_SUM),
        "and this is a CPU; leave --recorder out",
        (Engine("cpu", graphs=False),),
    ),
    "moe_sum with optional sums": (
        Engine(graphs=False, settings=ObserveSettings(recorder="moe_sum", extra_sums=("output_sum",)), layer=REDUCES),
        "collects no optional sums; leave --recorder out",
        (Engine(graphs=False, settings=SUMS),),
    ),
    # That vLLM takes a modular kernel then is tried with its own selection: test_kernel_selection.
    "a monolithic kernel that is kept": (
        Engine(settings=ObserveSettings(keep_kernel=True), layer=Layer(monolithic=True)),
        "inside a monolithic kernel .Kernel., .*; leave --keep-kernel out",
        (Engine(),),
    ),
    "a monolithic kernel that is named": (
        Engine(layer=Layer(monolithic=True)),
        "leave --moe-backend out",
        (Engine(),),
    ),
    "a monolithic kernel of a CPU": (
        Engine("cpu", graphs=False, layer=Layer(monolithic=True)),
        "observe the checkpoint that it was quantised from",
        (Engine("cpu", graphs=False),),
    ),
    "moe_sum with draft tokens": (
        Engine(settings=AT_SUM, config=speculative(), layer=REDUCES),
        "choose the deferred recorder and --enforce-eager, or start vLLM without speculative decoding",
        (
            Engine(graphs=False, settings=DEFERRED, config=speculative(), layer=REDUCES),
            Engine(settings=AT_SUM, layer=REDUCES),
        ),
    ),
    "optional sums with draft tokens": (
        Engine(graphs=False, settings=SUMS, config=speculative()),
        "do not wait for draft tokens; start vLLM without speculative decoding",
        (Engine(graphs=False, settings=SUMS),),
    ),
    "draft tokens under graphs": (
        Engine(config=speculative()),
        "start vLLM with --enforce-eager, or without speculative decoding",
        (Engine(graphs=False, config=speculative()), Engine()),
    ),
    "draft tokens in a pipeline": (
        Engine(graphs=False, config=speculative(pipeline_parallel_size=2)),
        "only the last stage .*; start vLLM without speculative decoding",
        (Engine(graphs=False, config=config(pipeline_parallel_size=2)),),
    ),
    "moe_sum with replicas of experts": (
        Engine(settings=AT_SUM, config=config(enable_eplb=True), layer=REDUCES),
        "choose the deferred recorder and --enforce-eager, or start vLLM without --enable-eplb",
        (
            Engine(graphs=False, settings=DEFERRED, config=config(enable_eplb=True), layer=REDUCES),
            Engine(settings=AT_SUM, layer=REDUCES),
        ),
    ),
    "a recorder that measures alone, with other ranks": (
        Engine(graphs=False, settings=INLINE, config=ranks()),
        "data parallel size 2 cannot; leave --recorder out",
        (Engine(graphs=False, config=ranks()),),
    ),
    "ranks under graphs": (
        Engine(config=ranks()),
        "cannot meet inside CUDA graphs; start vLLM with --enforce-eager",
        (Engine(graphs=False, config=ranks()),),
    ),
    "ranks with a compiled model": (
        Engine("cpu", graphs=False, config=ranks(), compiled=True),
        "a compiled model was never tried; start vLLM with --enforce-eager",
        (Engine("cpu", graphs=False, config=ranks()),),
    ),
    "optional sums of ranks": (
        Engine(graphs=False, settings=SUMS, config=ranks()),
        "optional sums .* data parallel size 2; collect them in an engine of one rank",
        (Engine(graphs=False, settings=SUMS),),
    ),
    "data and tensor parallelism": (
        Engine(graphs=False, config=ranks(tensor_parallel_size=2)),
        "was never tried; start vLLM with one of both",
        (Engine(graphs=False, config=ranks()), Engine(graphs=False, config=config(tensor_parallel_size=2))),
    ),
    "another all-to-all": (
        Engine(graphs=False, config=ranks(all2all_backend="deepep_low_latency")),
        "start vLLM with --all2all-backend allgather_reducescatter",
        (Engine(graphs=False, config=ranks(all2all_backend="allgather_reducescatter")),),
    ),
    "microbatches": (
        Engine(graphs=False, config=ranks(use_ubatching=True)),
        "start vLLM without --enable-dbo",
        (Engine(graphs=False, config=ranks()),),
    ),
    "prefill in parallel": (
        Engine(config=config(prefill_context_parallel_size=2)),
        "prefill context parallel size 2 mixes .*; start vLLM without it",
        (Engine(),),
    ),
    "fast prefill": (
        Engine(config=config(kv_sharing_fast_prefill=True)),
        "start vLLM without --kv-sharing-fast-prefill",
        (Engine(),),
    ),
    "a pipeline on a CPU": (
        Engine("cpu", graphs=False, config=config(pipeline_parallel_size=2)),
        "pipeline parallel size 2: .*; start vLLM without pipeline parallelism",
        (Engine("cpu", graphs=False),),
    ),
    "optional sums of slices of experts": (
        Engine(settings=SUMS, config=config(tensor_parallel_size=2)),
        "tensor parallel size 2; collect them in an engine of one rank",
        (Engine(settings=SUMS),),
    ),
    "logits of a model that routes by itself": (
        Engine(graphs=False, settings=GRAM, layer=Layer(in_model=True)),
        "shows no logits; leave logit_gram out",
        (Engine(graphs=False, layer=Layer(in_model=True)),),
    ),
}


@pytest.mark.parametrize(("refused", "reason", "followed"), REMEDIES.values(), ids=list(REMEDIES))
def test_a_refused_engine_is_accepted_when_its_remedy_is_followed(
    refused: Engine, reason: str, followed: tuple[Engine, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=reason):
        refused.start(monkeypatch)
    for engine in followed:
        engine.start(monkeypatch)


def test_expert_parallel_layers_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = object.__new__(CPUUnquantizedExperts)
    kernel._use_zentorch, kernel.isa = False, "vec"
    parallel = Engine("cpu", graphs=False, layer=Layer(kernel=kernel, expert_map=object()))
    with pytest.raises(EngineError, match=r"is expert parallel, .*; start vLLM without expert parallelism"):
        parallel.start(monkeypatch)
    Engine("cpu", graphs=False, layer=Layer(kernel=kernel)).start(monkeypatch)


def test_layers_that_nothing_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

    layers = {"has zero experts": Layer(router=object.__new__(ZeroExpertRouter))}
    for kind in (CPURouter, FusedTopKBiasRouter):
        hashing, plain = object.__new__(kind), object.__new__(kind)
        hashing._hash_indices_table, plain._hash_indices_table = object(), None
        Engine(layer=Layer(router=plain)).start(monkeypatch)
        layers[f"routes by a hash of the token; ({kind.__name__})"] = Layer(router=hashing)
    fusing = object.__new__(GroupedTopKRouter)
    fusing.num_fused_shared_experts = 0
    Engine(layer=Layer(router=fusing)).start(monkeypatch)
    fusing = object.__new__(GroupedTopKRouter)
    fusing.num_fused_shared_experts = 1
    layers["runs shared experts among the routed ones"] = Layer(router=fusing)
    layers["transforms the sum of its experts' outputs"] = Layer(routed_output_transform=object())
    for reason, layer in layers.items():
        with pytest.raises(EngineError, match=re.escape(reason.partition(" (")[0])):
            Engine(layer=layer).start(monkeypatch)


def test_drafts_that_a_model_runner_does_not_tell_of() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    second: Any = object()
    remedy = "set VLLM_USE_V2_MODEL_RUNNER=0, or start vLLM without speculative decoding"
    with pytest.raises(EngineError, match=f"second model runner .*; {remedy}"):
        refuse_untold_drafts(second, speculative())
    refuse_untold_drafts(object.__new__(GPUModelRunner), speculative())
    refuse_untold_drafts(second, SimpleNamespace(speculative_config=None))  # type: ignore[arg-type]
