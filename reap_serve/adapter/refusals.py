"""What observation cannot do right, refused when the model is loaded, each with its remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap_serve.adapter import engine_view
from reap_serve.adapter.defects import refuse_misrouted_layers
from reap_serve.errors import EngineError
from reap_serve.record.settings import ObserveSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def refuse_unsound(settings: ObserveSettings, vllm_config: VllmConfig, layers: list[MoERunner]) -> None:
    """Refuses an engine whose statistics would be wrong.

    Raises:
        EngineError: Says what stands in the way and what to change.
    """
    if not layers:
        raise EngineError("the model has no fused MoE layer in this process", "observe a Mixture-of-Experts model")
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        raise EngineError("rejected draft tokens would be counted", "start vLLM without speculative decoding")
    if parallel.enable_eplb:
        raise EngineError("EPLB moves experts while they are counted", "start vLLM without --enable-eplb")
    if parallel.data_parallel_size > 1:
        raise EngineError(
            f"data parallel size {parallel.data_parallel_size} mixes the rows of all ranks in a layer",
            "observe one replica, or run replicas of their own and merge their statistics",
        )
    if parallel.pipeline_parallel_size > 1 and engine_view.device_type() == "cpu":
        raise EngineError(
            f"pipeline parallel size {parallel.pipeline_parallel_size}: vLLM's CPU model runner fails at a request",
            "start vLLM without pipeline parallelism",
        )
    graphs = engine_view.captures_graphs(vllm_config)
    if settings.recorder == "inline" and graphs:
        raise EngineError(
            "CUDA graphs replay kernels without Python, where the inline recorder sees nothing",
            "leave --recorder out, or add --enforce-eager",
        )
    if settings.extra_sums and settings.recorder == "moe_sum":
        raise EngineError("the moe_sum recorder collects no optional sums", "leave --recorder out")
    if "logit_gram" in settings.extra_sums and graphs:
        raise EngineError("CUDA graphs replay the router without Python, which sums its logits", "add --enforce-eager")
    if settings.extra_sums and parallel.tensor_parallel_size > 1:
        raise EngineError(
            f"optional sums are not added up over tensor parallel size {parallel.tensor_parallel_size}",
            "collect them in an engine of one rank",
        )
    refuse_misrouted_layers(vllm_config, layers)
    for layer in layers:
        _refuse_layer(settings, layer)


def _refuse_layer(settings: ObserveSettings, layer: MoERunner) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
    from vllm.platforms import current_platform

    name, experts, router = layer.layer_name, layer.routed_experts, layer.router
    if "logit_gram" in settings.extra_sums and engine_view.routes_in_model(layer):
        raise EngineError(f"{name} routes inside the model, which shows no logits", "leave logit_gram out")
    if experts.quant_method.is_monolithic:
        raise EngineError(
            f"{name} routes inside a monolithic kernel ({engine_view.kernel_name(layer)}), which shows neither gate "
            "weights nor outputs",
            _monolithic_remedy(settings),
        )
    if isinstance(router, ZeroExpertRouter):
        raise EngineError(f"{name} has zero experts, which have no output norm", "this family cannot be observed")
    if isinstance(router, (CPURouter, FusedTopKBiasRouter)) and router._hash_indices_table is not None:
        raise EngineError(f"{name} routes by a hash of the token", "hash-routed layers cannot be pruned by saliency")
    if layer.routed_output_transform is not None:
        raise EngineError(
            f"{name} transforms the sum of its experts' outputs", "latent MoE layers cannot be observed yet"
        )
    if current_platform.is_cpu() and experts.expert_map is not None:
        raise EngineError(
            f"{name} is expert parallel, which vLLM's CPU kernel ignores", "start vLLM without expert parallelism"
        )
    if settings.recorder == "moe_sum":
        if current_platform.is_cpu():
            raise EngineError("the moe_sum recorder reads GPU kernels, and this is a CPU", "leave --recorder out")
        if engine_view.reducing_kernel(layer) is None:
            raise EngineError(
                f"{name}: its kernel, {engine_view.kernel_name(layer)}, shows no rows before it adds them",
                "leave --recorder out",
            )


def _monolithic_remedy(settings: ObserveSettings) -> str:
    if engine_view.device_type() == "cpu":
        return "vLLM's CPU has no other kernel for this format: observe the checkpoint that it was quantised from"
    if settings.keep_kernel:
        return "leave --keep-kernel out"
    return "leave --moe-backend out, or run vllm serve, which observes nothing"
