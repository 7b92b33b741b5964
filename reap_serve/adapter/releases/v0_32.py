"""Every name of vLLM 0.32 that is used here, private ones too. Other releases are told by their differences from it."""

from __future__ import annotations

from reap_serve.adapter.releases.names import ClassNames, FunctionNames, Release, TextName, ValueName
from reap_serve.adapter.releases.v0_32_experts import KERNELS, ROUTERS
from reap_serve.adapter.releases.v0_32_server import OFFLINE, PROBED, SERVER, VARIABLES

_MOE = "vllm.model_executor.layers.fused_moe"

LAYERS = (
    ClassNames(
        "vllm.model_executor.custom_op",
        "PluggableLayer",
        methods={"register_oot": ("cls", "_decorated_layer_cls", "name")},
    ),
    ValueName("vllm.model_executor.custom_op", "op_registry_oot"),
    ClassNames(
        f"{_MOE}.runner.moe_runner",
        "MoERunner",
        attributes=(
            "layer_id",
            "layer_name",
            "moe_config",
            "routed_experts",
            "routed_output_transform",
            "routed_scaling_factor",
            "router",
            "_forward_entry",
            "_shared_experts",
        ),
        methods={"_select_forward": ("self",)},
    ),
    TextName(f"{_MOE}.runner.moe_runner", "moe_forward"),
    TextName(f"{_MOE}.runner.moe_runner", "moe_forward_shared"),
    ClassNames(f"{_MOE}.runner.moe_runner_interface", "MoERunnerInterface"),
    ClassNames("vllm.model_executor.models.transformers.moe", "TransformersMoERunner"),
    ClassNames(
        f"{_MOE}.routed_experts",
        "RoutedExperts",
        attributes=(
            "apply_router_weight_on_input",
            "expert_map",
            "e_score_correction_bias",
            "layer_name",
            "quant_method",
        ),
        methods={
            "forward_modular": ("self", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
            "get_expert_mapping": ("self",),
            "load_weights": ("self", "weights"),
        },
    ),
    TextName(f"{_MOE}.unquantized_fused_moe_method", "w13_weight"),
    TextName(f"{_MOE}.unquantized_fused_moe_method", "w2_weight"),
    ClassNames(
        f"{_MOE}.config",
        "FusedMoEConfig",
        attributes=(
            "dp_size",
            "_defer_moe_finalize",
            "experts_per_token",
            "hidden_dim",
            "hidden_dim_unpadded",
            "in_dtype",
            "moe_parallel_config",
            "num_experts",
            "num_logical_experts",
            "tp_size",
        ),
    ),
    ClassNames(f"{_MOE}.config", "FusedMoEParallelConfig", attributes=("enable_eplb",)),
    ClassNames(
        f"{_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase",
        attributes=("is_monolithic", "moe_kernel", "skip_forward_padding"),
        methods={"apply": ("self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input")},
    ),
    ClassNames(f"{_MOE}.modular_kernel", "FusedMoEKernel", attributes=("fused_experts",)),
    ClassNames(
        f"{_MOE}.modular_kernel",
        "FusedMoEExperts",
        methods={
            "is_monolithic": (),
            "is_supported_config": ("cls", "moe_config", "weight_key", "activation_key", "activation_format"),
        },
    ),
    ClassNames(f"{_MOE}.modular_kernel", "FusedMoEExpertsMonolithic"),
    ClassNames(
        f"{_MOE}.runner.shared_experts", "SharedExperts", methods={"forward": ("self", "shared_experts_input", "order")}
    ),
    ClassNames(f"{_MOE}.runner.shared_experts", "SharedExpertsOrder", attributes=("MK_INTERNAL_OVERLAPPED",)),
    # Refused by the end of its name, as are those of other models.
    ClassNames("vllm.models.deepseek_v4.xpu.model", "DeepseekV4MegaMoEExperts"),
)

STEPS = (
    ClassNames(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        attributes=("device", "input_batch", "max_model_len", "model_memory_usage", "vllm_config"),
        methods={
            "get_model": ("self",),
            "load_model": ("self", "load_dummy_weights"),
            "execute_model": ("self", "scheduler_output", "intermediate_tensors"),
            "_prepare_inputs": ("self", "scheduler_output", "num_scheduled_tokens"),
            "_sample": ("self", "logits", "spec_decode_metadata"),
            "shutdown": ("self",),
        },
    ),
    ClassNames("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", methods={"load_model": ("self",)}),
    ClassNames("vllm.v1.worker.gpu_input_batch", "InputBatch", attributes=("num_computed_tokens_cpu", "req_ids")),
    ClassNames("vllm.v1.worker.worker_base", "WorkerBase", attributes=("model_runner",)),
    ClassNames("vllm.v1.worker.gpu_worker", "Worker", methods={"compile_or_warm_up_model": ("self",)}),
    ClassNames(
        "vllm.v1.core.sched.output",
        "SchedulerOutput",
        attributes=(
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_cached_reqs",
            "scheduled_new_reqs",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    ClassNames(
        "vllm.v1.core.sched.output", "NewRequestData", attributes=("prompt_token_ids", "req_id", "sampling_params")
    ),
    ClassNames("vllm.v1.core.sched.output", "CachedRequestData", attributes=("resumed_req_ids",)),
    ClassNames("vllm.v1.outputs", "SamplerOutput", attributes=("sampled_token_ids",)),
    ClassNames("vllm.forward_context", "ForwardContext", attributes=("dp_metadata", "no_compile_layers")),
    ClassNames("vllm.forward_context", "DPMetadata", attributes=("local_sizes",)),
    FunctionNames("vllm.distributed.parallel_state", "get_dp_group"),
    ClassNames(
        "vllm.distributed.parallel_state",
        "GroupCoordinator",
        attributes=("cpu_group", "rank_in_group", "world_size"),
    ),
    FunctionNames("vllm.forward_context", "get_forward_context"),
    FunctionNames("vllm.distributed.parallel_state", "cleanup_dist_env_and_memory"),
    FunctionNames("vllm.distributed.parallel_state", "get_tensor_model_parallel_rank"),
    FunctionNames("vllm.distributed.parallel_state", "get_tp_group"),
    FunctionNames("vllm.distributed.parallel_state", "get_world_group"),
    ClassNames("vllm.distributed.parallel_state", "GroupCoordinator", attributes=("cpu_group", "ranks", "world_size")),
    FunctionNames("vllm.distributed.communication_op", "tensor_model_parallel_all_reduce", ("input_",)),
)

# The second model runner, which a GPU alone uses; its class has the first one's name, so its module is named by it.
SECOND_RUNNER = (
    ClassNames(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner",
        attributes=("device", "max_model_len", "model_memory_usage", "vllm_config"),
        methods={
            "get_model": ("self",),
            "load_model": ("self", "load_dummy_weights"),
            "execute_model": ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
            "prepare_inputs": ("self", "scheduler_output"),
            "shutdown": ("self",),
        },
    ),
    ClassNames(
        "vllm.v1.worker.gpu.input_batch",
        "InputBatch",
        attributes=("num_computed_tokens_np", "num_scheduled_tokens", "req_ids"),
    ),
)

CONFIGURATION = (
    FunctionNames("vllm.config", "get_current_vllm_config"),
    FunctionNames("vllm.config", "get_current_vllm_config_or_none"),
    ClassNames(
        "vllm.config",
        "VllmConfig",
        attributes=(
            "additional_config",
            "cache_config",
            "compilation_config",
            "device_config",
            "model_config",
            "parallel_config",
            "scheduler_config",
            "speculative_config",
        ),
    ),
    ClassNames("vllm.config", "CacheConfig", attributes=("kv_cache_size_tokens", "kv_sharing_fast_prefill")),
    ClassNames(
        "vllm.config",
        "CompilationConfig",
        attributes=("cudagraph_mode", "custom_ops", "max_cudagraph_capture_size", "mode", "static_forward_context"),
    ),
    ClassNames("vllm.config", "DeviceConfig", attributes=("device_type",)),
    ClassNames("vllm.config", "ModelConfig", attributes=("dtype", "hf_config", "max_model_len", "model", "revision")),
    ClassNames(
        "vllm.config",
        "ParallelConfig",
        attributes=(
            "all2all_backend",
            "data_parallel_rank",
            "data_parallel_size",
            "enable_eplb",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "tensor_parallel_size",
            "use_ubatching",
            "_api_process_rank",
        ),
    ),
    TextName("vllm.config.parallel", "allgather_reducescatter"),
    TextName("vllm.config.parallel", "naive"),
    TextName("vllm.model_executor.layers.rotary_embedding.base", "rotary_embedding"),
    ClassNames("vllm.config", "SchedulerConfig", attributes=("max_num_batched_tokens",)),
    ClassNames("vllm.config", "CompilationMode", attributes=("NONE",)),
    ClassNames("vllm.config", "CUDAGraphMode", attributes=("NONE",)),
    ValueName("vllm.platforms", "current_platform"),
    ClassNames(
        "vllm.platforms.interface",
        "Platform",
        attributes=("device_type",),
        methods={"is_cpu": ("self",), "get_attn_backend_cls": ("cls", "selected_backend", "attn_selector_config")},
    ),
)

V0_32 = Release(
    "0.32",
    (*LAYERS, *KERNELS, *ROUTERS, *STEPS, *SECOND_RUNNER, *CONFIGURATION, *VARIABLES, *SERVER, *OFFLINE, *PROBED),
)
