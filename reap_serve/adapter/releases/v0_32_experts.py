"""The part of vLLM 0.32's table that is of kernels and routers."""

from __future__ import annotations

from reap_serve.adapter.releases.names import ClassNames, Entry, FunctionNames

_MOE = "vllm.model_executor.layers.fused_moe"

KERNELS: tuple[Entry, ...] = (
    ClassNames(
        f"{_MOE}.experts.cpu_moe",
        "CPUUnquantizedExperts",
        attributes=("isa", "_use_zentorch"),
        methods={
            "apply": (
                *("self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation"),
                *("global_num_experts", "expert_map"),
            )
        },
    ),
    # What declares the operator `torch.ops._C.cpu_fused_moe`.
    FunctionNames(
        "vllm._custom_ops",
        "cpu_fused_moe",
        ("out", "input", "w13", "w2", "w13_bias", "w2_bias", "topk_weights", "topk_ids", "act", "isa", "skip_weighted"),
    ),
    *(
        ClassNames(f"{_MOE}.experts.cpu_moe", name, methods={"_supports_current_device": ()})
        for name in ("CPUExpertsFp8", "CPUExpertsInt4", "CPUExpertsMxfp4")
    ),
    ClassNames(f"{_MOE}.experts.triton_moe", "TritonExperts", methods={"moe_sum": ("self", "input", "output")}),
    ClassNames(f"{_MOE}.experts.marlin_moe", "MarlinExperts", methods={"moe_sum": ("self", "input", "output")}),
    ClassNames(f"{_MOE}.experts.marlin_moe", "BatchedMarlinExperts"),
    # Kernels that take the number of experts per token from the layer; others with this attribute are treated alike.
    *(
        ClassNames(f"{_MOE}.experts.{module}", name, attributes=("topk",))
        for module, name in (
            ("flashinfer_b12x_moe", "FlashInferB12xExperts"),
            ("flashinfer_cutedsl_moe", "FlashInferCuteDSLExperts"),
            ("trtllm_bf16_moe", "TrtLlmBf16ExpertsBase"),
            ("trtllm_fp8_moe", "TrtLlmFp8ExpertsBase"),
            ("trtllm_lora_moe", "_TrtLlmLoRAExpertsBase"),
            ("trtllm_mxfp4_moe", "TrtLlmMxfp4ExpertsBase"),
            ("trtllm_nvfp4_moe", "TrtLlmNvFp4ExpertsBase"),
        )
    ),
)

ROUTERS = (
    ClassNames(
        f"{_MOE}.router.base_router",
        "BaseRouter",
        attributes=("global_num_experts",),
        methods={"_compute_routing": ("self", "hidden_states", "router_logits", "indices_type", "input_ids")},
    ),
    ClassNames(
        f"{_MOE}.router.cpu_router",
        "CPURouter",
        attributes=(
            "custom_routing_function",
            "e_score_correction_bias",
            "scoring_func",
            "use_grouped_topk",
            "_hash_indices_table",
        ),
    ),
    ClassNames(
        f"{_MOE}.router.fused_topk_bias_router",
        "FusedTopKBiasRouter",
        attributes=("e_score_correction_bias", "num_fused_shared_experts", "_hash_indices_table"),
    ),
    ClassNames(
        f"{_MOE}.router.grouped_topk_router",
        "GroupedTopKRouter",
        attributes=("e_score_correction_bias", "num_fused_shared_experts"),
    ),
    ClassNames(
        f"{_MOE}.router.aiter_shared_routed_fused_moe_router",
        "AiterSharedRoutedFusedMoERouter",
        attributes=("num_fused_shared_experts",),
    ),
    ClassNames(f"{_MOE}.router.custom_routing_router", "CustomRoutingRouter", attributes=("custom_routing_function",)),
    ClassNames(f"{_MOE}.router.zero_expert_router", "ZeroExpertRouter"),
    ClassNames(f"{_MOE}.router.fused_moe_router", "FusedMoERouter", attributes=("eplb_state",)),
    ClassNames("vllm.distributed.eplb.eplb_state", "EplbLayerState", attributes=("logical_to_physical_map",)),
)
