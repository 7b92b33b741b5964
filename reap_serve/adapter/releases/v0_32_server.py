"""The part of vLLM 0.32's table that engine processes do without: servers, engines in this process, probes."""

from __future__ import annotations

from reap_serve.adapter.releases.names import ClassNames, FunctionNames, ModuleName

_PROTOCOLS = "vllm.entrypoints.openai"

SERVER = (
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
        attributes=("engine_core", "input_processor", "vllm_config"),
        methods={
            "collective_rpc": ("self", "method", "timeout", "args", "kwargs"),
            "generate": ("self", "prompt", "sampling_params"),
            "shutdown": ("self",),
        },
    ),
    # Of one engine, and of data-parallel ones, whose calls it sends to each.
    ClassNames(
        "vllm.v1.engine.core_client",
        "AsyncMPClient",
        attributes=("core_engines",),
        methods={"_call_utility_async": ("self", "method", "engine")},
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
    ClassNames("vllm.exceptions", "VLLMValidationError"),
    ClassNames(
        f"{_PROTOCOLS}.chat_completion.protocol", "ChatCompletionRequest", methods={"to_sampling_params": ("self",)}
    ),
    ClassNames(f"{_PROTOCOLS}.completion.protocol", "CompletionRequest", methods={"to_sampling_params": ("self",)}),
    ClassNames(f"{_PROTOCOLS}.responses.protocol", "ResponsesRequest", methods={"to_sampling_params": ("self",)}),
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
            "generate": ("self", "prompts", "sampling_params"),
            "get_tokenizer": ("self",),
            "_preprocess_chat_one": ("self", "conversation", "chat_template"),
        },
    ),
    # Its fields are the arguments that there are.
    ClassNames("vllm", "EngineArgs"),
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
    ClassNames("vllm.distributed.device_communicators.cpu_communicator", "CpuCommunicator"),
    ClassNames(
        "vllm.model_executor.layers.rotary_embedding.base",
        "RotaryEmbedding",
        methods={"forward_cpu": ("self", "positions", "query", "key")},
    ),
    ClassNames("vllm.model_executor.models.laguna", "LagunaModel", attributes=("hf_to_vllm_mapper",)),
    FunctionNames("vllm.utils.import_utils", "resolve_obj_by_qualname", ("qualname",)),
)
