"""What observation cannot do right, refused when the model is loaded, each with its remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap_serve.adapter import engine_view, layer_view
from reap_serve.adapter.defects import refuse_misrouted_layers, refuse_ungathered_rows
from reap_serve.adapter.releases.check import attribute_or_none
from reap_serve.errors import EngineError
from reap_serve.record.settings import ObserveSettings

# Those whose dispatch takes whatever numbers of rows the ranks agree on.
ALL2ALL_BACKENDS = ("allgather_reducescatter", "naive")

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# Recorders, as users name them, that steps replayed from CUDA graphs reach; and those that have whole outputs.
IN_GRAPHS = frozenset({"auto", "deferred", "moe_sum"})
OF_WHOLE_OUTPUTS = frozenset({"auto", "inline", "deferred"})


def refuse_unsound(settings: ObserveSettings, vllm_config: VllmConfig, layers: list[MoERunner]) -> None:
    """Refuses an engine whose statistics would be wrong.

    Raises:
        EngineError: Says what stands in the way and what to change.
    """
    if not layers:
        raise EngineError("the model has no fused MoE layer in this process", "observe a Mixture-of-Experts model")
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        _refuse_speculation(settings, vllm_config)
    if parallel.enable_eplb and settings.recorder == "moe_sum":
        raise EngineError(
            "the moe_sum recorder reads rows inside CUDA graphs, where EPLB's replicas cannot be told apart",
            "choose the deferred recorder and --enforce-eager, or start vLLM without --enable-eplb",
        )
    if parallel.data_parallel_size > 1:
        _refuse_data_parallel(settings, vllm_config)
    if parallel.prefill_context_parallel_size > 1:
        raise EngineError(
            f"prefill context parallel size {parallel.prefill_context_parallel_size} mixes the rows of all ranks",
            "start vLLM without it",
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise EngineError(
            "fast prefill leaves rows of prompts out of later layers",
            "start vLLM without --kv-sharing-fast-prefill",
        )
    if parallel.pipeline_parallel_size > 1 and engine_view.device_type() == "cpu":
        raise EngineError(
            f"pipeline parallel size {parallel.pipeline_parallel_size}: vLLM's CPU model runner fails at a request",
            "start vLLM without pipeline parallelism",
        )
    graphs = engine_view.captures_graphs(vllm_config)
    if graphs and settings.recorder not in IN_GRAPHS:
        raise EngineError(
            f"CUDA graphs replay kernels without Python, where the {settings.recorder} recorder sees nothing",
            "leave --recorder out, or add --enforce-eager",
        )
    if settings.recorder == "moe_sum" and settings.overhead_budget is not None:
        raise EngineError(
            f"the moe_sum recorder measures every row, which no budget of {settings.overhead_budget:g} holds",
            "add --overhead-budget none, or leave --recorder out",
        )
    if settings.extra_sums and settings.recorder not in OF_WHOLE_OUTPUTS:
        raise EngineError(f"the {settings.recorder} recorder collects no optional sums", "leave --recorder out")
    if settings.sums_of_logits and graphs:
        raise EngineError("CUDA graphs replay the router without Python, which sums its logits", "add --enforce-eager")
    if settings.extra_sums and parallel.tensor_parallel_size > 1:
        raise EngineError(
            f"optional sums are not added up over tensor parallel size {parallel.tensor_parallel_size}",
            "collect them in an engine of one rank",
        )
    refuse_misrouted_layers(vllm_config, layers)
    for layer in layers:
        _refuse_layer(settings, layer)


def _refuse_speculation(settings: ObserveSettings, vllm_config: VllmConfig) -> None:
    if settings.recorder == "moe_sum":
        raise EngineError(
            "the moe_sum recorder adds rows inside CUDA graphs, before sampling tells which draft tokens are taken",
            "choose the deferred recorder and --enforce-eager, or start vLLM without speculative decoding",
        )
    if settings.extra_sums:
        raise EngineError("optional sums do not wait for draft tokens", "start vLLM without speculative decoding")
    if engine_view.captures_graphs(vllm_config):
        raise EngineError(
            "rows that CUDA graphs gather do not yet wait for the verdict on draft tokens",
            "start vLLM with --enforce-eager, or without speculative decoding",
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise EngineError(
            "of a pipeline only the last stage knows which draft tokens are taken",
            "start vLLM without speculative decoding",
        )


def refuse_untold_drafts(model_runner: GPUModelRunner, vllm_config: VllmConfig) -> None:
    """Refuses speculative decoding where nobody tells which draft tokens are taken.

    Raises:
        EngineError: The model runner is not the one whose sampling is seen.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as FirstModelRunner

    if vllm_config.speculative_config is not None and not isinstance(model_runner, FirstModelRunner):
        raise EngineError(
            "vLLM's second model runner does not yet tell here which draft tokens are taken",
            "set VLLM_USE_V2_MODEL_RUNNER=0, or start vLLM without speculative decoding",
        )


def _refuse_data_parallel(settings: ObserveSettings, vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    size = parallel.data_parallel_size
    if settings.recorder not in ("auto", "deferred"):
        raise EngineError(
            f"the {settings.recorder} recorder measures alone, which a rank of data parallel size {size} cannot",
            "leave --recorder out",
        )
    if engine_view.captures_graphs(vllm_config):
        raise EngineError(
            f"ranks of data parallel size {size} cannot meet inside CUDA graphs", "start vLLM with --enforce-eager"
        )
    if engine_view.traces_graphs(vllm_config):
        raise EngineError(
            f"data parallel size {size} with a compiled model was never tried", "start vLLM with --enforce-eager"
        )
    if settings.extra_sums:
        raise EngineError(
            f"optional sums are not collected under data parallel size {size}", "collect them in an engine of one rank"
        )
    if parallel.tensor_parallel_size > 1:
        raise EngineError(
            f"data parallel size {size} with tensor parallel size {parallel.tensor_parallel_size} was never tried",
            "start vLLM with one of both",
        )
    if parallel.all2all_backend not in ALL2ALL_BACKENDS:
        raise EngineError(
            f"the all-to-all backend {parallel.all2all_backend} was never tried with held-back rows",
            f"start vLLM with --all2all-backend {ALL2ALL_BACKENDS[0]}",
        )
    if parallel.use_ubatching:
        raise EngineError("microbatches split the rows of a step", "start vLLM without --enable-dbo")
    refuse_ungathered_rows(size)


def _refuse_layer(settings: ObserveSettings, layer: MoERunner) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
    from vllm.platforms import current_platform

    name, experts, router = layer.layer_name, layer.routed_experts, layer.router
    if settings.sums_of_logits and layer_view.routes_in_model(layer):
        remedy = f"leave {' and '.join(settings.sums_of_logits)} out"
        raise EngineError(f"{name} routes inside the model, which shows no logits", remedy)
    if experts.quant_method.is_monolithic:
        raise EngineError(
            f"{name} routes inside a monolithic kernel ({layer_view.kernel_name(layer)}), which shows neither gate "
            "weights nor outputs",
            _monolithic_remedy(settings),
        )
    if isinstance(router, ZeroExpertRouter):
        raise EngineError(f"{name} has zero experts, which have no output norm", "this family cannot be observed")
    if isinstance(router, (CPURouter, FusedTopKBiasRouter)) and router._hash_indices_table is not None:
        raise EngineError(f"{name} routes by a hash of the token", "hash-routed layers cannot be pruned by saliency")
    if attribute_or_none(router, "num_fused_shared_experts"):
        raise EngineError(
            f"{name} runs shared experts among the routed ones, for every token",
            "set VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0",
        )
    if layer.routed_output_transform is not None:
        raise EngineError(
            f"{name} transforms the sum of its experts' outputs", "latent MoE layers cannot be observed yet"
        )
    if experts.expert_map is not None and layer_view.cpu_kernel(layer) is not None:
        raise EngineError(
            f"{name} is expert parallel, which vLLM's CPU kernel ignores", "start vLLM without expert parallelism"
        )
    if settings.recorder == "moe_sum":
        if current_platform.is_cpu():
            raise EngineError("the moe_sum recorder reads GPU kernels, and this is a CPU", "leave --recorder out")
        if layer_view.reducing_kernel(layer) is None:
            raise EngineError(
                f"{name}: its kernel, {layer_view.kernel_name(layer)}, shows no rows before it adds them",
                "leave --recorder out",
            )


def _monolithic_remedy(settings: ObserveSettings) -> str:
    if engine_view.device_type() == "cpu":
        return "vLLM's CPU has no other kernel for this format: observe the checkpoint that it was quantised from"
    if settings.keep_kernel:
        return "leave --keep-kernel out"
    return "leave --moe-backend out, or run vllm serve, which observes nothing"
