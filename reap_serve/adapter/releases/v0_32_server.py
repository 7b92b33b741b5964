"""The part of vLLM 0.32's table that engine processes do without: servers, engines in this process, probes."""

from __future__ import annotations

from reap_serve.adapter.releases.names import ClassNames, Entry, FunctionNames, ModuleName, TextName

_PROTOCOLS = "vllm.entrypoints.openai"

# Environment variables, of `reap_serve.engine_environment` and of what starts engines here.
VARIABLES = tuple(
    TextName("vllm.envs", name)
    for name in (
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_NO_USAGE_STATS",
        "VLLM_PLUGINS",
        "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS",
        "VLLM_USE_V2_MODEL_RUNNER",
    )
)

SERVER: tuple[Entry, ...] = (
    *(
        TextName("vllm.plugins", f"vllm.{group}_plugins")
        for group in ("endpoint", "general", "io_processor", "platform", "stat_logger")
    ),
    ClassNames(
        "vllm.plugins.endpoint_plugins.interface",
        "EndpointPlugin",
        attributes=("name", "required_tasks"),
        methods={"attach_router": ("self", "app"), "init_state": ("self", "engine_client", "state", "args")},
    ),
    # A line of a server's log, read for what loading the weights took.
    TextName("vllm.v1.worker.gpu_model_runner", "Model loading took %s GiB memory and %.6f seconds"),
    TextName("vllm.v1.worker.gpu.model_runner", "Model loading took %s GiB memory and %.6f seconds"),
    FunctionNames("vllm.entrypoints.cli.serve", "cmd_init"),
    ClassNames(
        "vllm.entrypoints.cli.serve",
        "ServeSubcommand",
        methods={"cmd": ("args",), "subparser_init": ("self", "subparsers"), "validate": ("self", "args")},
    ),
    FunctionNames("vllm.entrypoints.serve.utils.api_utils", "cli_env_setup"),
    FunctionNames("vllm.logger", "configure_logging_from_args", ("args",)),
    ClassNames("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
    ClassNames(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        attributes=("engine_core", "errored", "input_processor", "vllm_config"),
        methods={
            "collective_rpc": ("self", "method", "timeout", "args", "kwargs"),
            "generate": ("self", "prompt", "sampling_params", "request_id"),
            "shutdown": ("self", "timeout"),
        },
    ),
    # Of one engine, and of data-parallel ones, whose calls it sends to each.
    ClassNames(
        "vllm.v1.engine.core_client",
        "AsyncMPClient",
        attributes=("core_engines",),
        methods={"_call_utility_async": ("self", "method", "engine")},
    ),
    # The utility that is called by that name in each engine.
    ClassNames(
        "vllm.v1.engine.core",
        "EngineCore",
        methods={"collective_rpc": ("self", "method", "timeout", "args", "kwargs")},
    ),
    ClassNames(
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        attributes=("process_inputs_async", "renderer"),
        methods={"process_inputs": ("self", "request_id", "prompt", "params")},
    ),
    ClassNames("vllm.renderers", "BaseRenderer", attributes=("_executor",)),
    ClassNames("vllm.v1.engine", "EngineCoreRequest", attributes=("cache_salt", "sampling_params")),
    FunctionNames("vllm.utils.async_utils", "make_async", ("func", "executor")),
    ClassNames("vllm.exceptions", "VLLMClientError"),
    ClassNames("vllm.exceptions", "VLLMValidationError", methods={"__init__": ("self", "message", "parameter")}),
    ClassNames(
        f"{_PROTOCOLS}.chat_completion.protocol", "ChatCompletionRequest", methods={"to_sampling_params": ("self",)}
    ),
    ClassNames(f"{_PROTOCOLS}.completion.protocol", "CompletionRequest", methods={"to_sampling_params": ("self",)}),
    ClassNames(
        f"{_PROTOCOLS}.responses.protocol",
        "ResponsesRequest",
        attributes=("metadata",),
        methods={"to_sampling_params": ("self",)},
    ),
    FunctionNames("vllm.benchmarks.serve", "add_cli_args", ("parser",)),
    FunctionNames("vllm.benchmarks.serve", "main", ("args",)),
)

OFFLINE = (
    ClassNames(
        "vllm",
        "LLM",
        attributes=("llm_engine", "model_config"),
        methods={
            "collective_rpc": ("self", "method", "timeout", "args", "kwargs"),
            "generate": ("self", "prompts", "sampling_params", "use_tqdm"),
            "get_tokenizer": ("self",),
            "_preprocess_chat_one": (
                *("self", "conversation", "chat_template", "chat_template_content_format", "chat_template_kwargs"),
                *("add_generation_prompt", "continue_final_message", "tools"),
            ),
        },
    ),
    # Its fields are the arguments that there are; these are given here.
    ClassNames(
        "vllm",
        "EngineArgs",
        attributes=(
            "additional_config",
            "attention_backend",
            "compilation_config",
            "data_parallel_size",
            "disable_log_stats",
            "dtype",
            "enable_prefix_caching",
            "enforce_eager",
            "max_logprobs",
            "max_model_len",
            "model",
            "skip_tokenizer_init",
            "worker_extension_cls",
        ),
    ),
    ClassNames("vllm.v1.attention.backends.registry", "AttentionBackendEnum", attributes=("CPU_MLA",)),
    ClassNames("vllm.inputs.llm", "TokensPrompt", attributes=("prompt_token_ids",)),
    ClassNames("vllm.v1.engine.llm_engine", "LLMEngine", attributes=("engine_core", "vllm_config")),
    ClassNames("vllm.v1.engine.core_client", "EngineCoreClient", methods={"shutdown": ("self",)}),
    ClassNames(
        "vllm",
        "SamplingParams",
        attributes=(
            "detokenize",
            "eos_token_id",
            "extra_args",
            "flat_logprobs",
            "ignore_eos",
            "max_tokens",
            "prompt_logprobs",
            "repetition_detection",
            "stop_token_ids",
            "temperature",
        ),
    ),
    ClassNames("vllm.sampling_params", "RepetitionDetectionParams"),
    ClassNames("vllm.outputs", "RequestOutput", attributes=("outputs", "prompt_logprobs")),
    ClassNames("vllm.outputs", "CompletionOutput", attributes=("finish_reason", "text", "token_ids")),
    ClassNames("vllm.logprobs", "FlatLogprobs", attributes=("logprobs", "token_ids")),
    ModuleName("vllm.entrypoints.cli.main"),
    ModuleName("vllm.entrypoints.openai.api_server"),
)

# What the probes of known defects run.
PROBED = (
    ClassNames(
        "vllm.distributed.device_communicators.cpu_communicator",
        "CpuCommunicator",
        methods={"all_gatherv": ("self", "input_")},
    ),
    # What the stand-ins of the probes have of it.
    ClassNames("vllm.v1.attention.selector", "AttentionSelectorConfig", attributes=("dtype", "use_mla", "use_sparse")),
    ClassNames("vllm.v1.attention.backend", "AttentionBackend", attributes=("supported_dtypes",)),
    ClassNames(
        "vllm.model_executor.layers.rotary_embedding.base",
        "RotaryEmbedding",
        attributes=("cos_sin_cache", "head_size", "is_neox_style"),
        methods={
            "forward_cpu": ("self", "positions", "query", "key"),
            "_match_cos_sin_cache_dtype": ("self", "query"),
        },
    ),
    ClassNames("vllm.model_executor.models.laguna", "LagunaModel", attributes=("hf_to_vllm_mapper",)),
    ClassNames("vllm.model_executor.models.utils", "WeightsMapper", methods={"map_name": ("self", "key")}),
    FunctionNames("vllm.utils.import_utils", "resolve_obj_by_qualname", ("qualname",)),
)
