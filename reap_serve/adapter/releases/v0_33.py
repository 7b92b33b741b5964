"""vLLM 0.33: it has no CPU wheel and pins another torch, so its names are checked here and its engine was never run."""

from __future__ import annotations

from reap_serve.adapter.releases.names import ClassNames, FunctionNames
from reap_serve.adapter.releases.v0_32 import V0_32

V0_33 = V0_32.derive(
    "0.33",
    moved={"cli_env_setup": "vllm.entrypoints.common.startup"},
    added=(
        # It rewrites the chosen experts inside its own `forward_modular`: refused.
        ClassNames("vllm.model_executor.layers.fused_moe.expert_substitution", "SubstitutedRoutedExperts"),
        # Mega MoE kernels of several models.
        ClassNames("vllm.model_executor.layers.fused_moe.deep_gemm_mega_moe", "DeepGemmMegaMoEExperts"),
        # They compute decode steps past their layers: refused.
        ClassNames("vllm.models.flint.ops.moe", "FlintBf16DecodeMoE"),
        ClassNames("vllm.models.deepseek_v4.amd.mono_decode", "MonoDecodeLayer"),
        ClassNames("vllm.models.deepseek_v41.nvidia.specialized_decode", "DecodeConfig"),
        ClassNames("vllm.models.minimax_m3.amd.specialized_decode.runtime.spec", "DecodeConfig"),
        # A model of the Transformers backend routes by it on a plain `MoERunner`: such a layer routes in the model.
        FunctionNames("vllm.model_executor.models.transformers.moe", "_hf_topk_router"),
        FunctionNames("vllm.model_executor.models.transformers.moe", "_hf_topk_router_precomputed"),
    ),
    tested=False,
)
