"""What observation puts into a vLLM that fits (`fit`).

Target: `MoERunner`, `TransformersMoERunner` (replaced through `PluggableLayer.register_oot`),
    `RoutedExperts.forward_modular`, `GPUModelRunner.load_model`, `.execute_model`, `._prepare_inputs`,
    `Worker.compile_or_warm_up_model`.
Why: the routed tokens, their gate weights and the kernel meet in `forward_modular`; which request a row belongs to is
    known to the model runner alone.
How: the out-of-tree layer taps its own experts; the model runner's methods are wrapped once, and do nothing unless the
    engine's additional configuration has `reap_serve`.
Upstream: none offers output norms; routed ids alone come with `--enable-return-routed-experts`.
Remove when: vLLM hands (input, weights, ids) of each fused MoE call and the batch's request ids to a plugin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from reap_serve.adapter import engine_view
from reap_serve.adapter.fit import settings_of
from reap_serve.adapter.loaded import LoadedEngine
from reap_serve.adapter.routing import add_routing_hook
from reap_serve.adapter.tap import add_tap
from reap_serve.record.step import BatchRows, NewRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

# Attribute of an observed model runner.
STEP_HOOKS = "reap_live"


class StepHooks(Protocol):
    """What the seams call at each step of an engine.

    Attributes:
        rows_wanted: Whether `rows_ordered` is to be called in the step that has begun.
    """

    rows_wanted: bool

    def step_begins(self, finished: Collection[str], new: Sequence[NewRequest]) -> None:
        """The scheduler's choice reached the model runner: with it some requests leave, then others enter."""

    def rows_ordered(self, batch: BatchRows) -> None:
        """The order of the step's rows is final; the forward pass follows."""

    def step_ends(self) -> None:
        """The forward pass is over, or the step had none."""

    def step_fails(self) -> None:
        """The forward pass raised; `step_ends` follows."""

    def rows_sampled(self, sampled: Sequence[Sequence[int]]) -> None:
        """The step that has ended verified draft tokens: what its requests got, -1 for none."""

    def close(self) -> None:
        """The worker shuts down; no step follows."""


ModelLoaded = Callable[[LoadedEngine], StepHooks]


def install(model_loaded: ModelLoaded) -> None:
    """Puts the observing layers and the wrapped model runner in place, once a process.

    Args:
        model_loaded: Called in every engine whose additional configuration has our key, as soon as its weights are in
            place; gives what follows the engine's steps.
    """
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner
    from vllm.platforms import current_platform
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_worker import Worker

    if MoERunner.__name__ in op_registry_oot:
        return
    for plain in (MoERunner, TransformersMoERunner):
        PluggableLayer.register_oot(name=plain.__name__)(_observing_class(plain))
    for runner_class in (GPUModelRunner, CPUModelRunner):
        _wrap_load(runner_class, model_loaded)
    _wrap_steps(GPUModelRunner, "_prepare_inputs", _rows_of_first_runner)
    _wrap_sampling(GPUModelRunner)
    _wrap_shutdown(GPUModelRunner)
    _wrap_warm_up(Worker)
    if not current_platform.is_cpu():
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondModelRunner

        _wrap_load(SecondModelRunner, model_loaded)
        _wrap_steps(SecondModelRunner, "prepare_inputs", _rows_of_second_runner)
        _wrap_shutdown(SecondModelRunner)


def _observing_class(plain: type) -> type:
    """A subclass with room for a tap and a hook where the engine asks for them, which turns into `plain` elsewhere."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
        vllm_config = get_current_vllm_config()
        if settings_of(vllm_config) is None:
            self.__class__ = plain
        else:
            add_tap(self)
            add_routing_hook(self, traced=engine_view.traces_graphs(vllm_config))

    return type(f"Observing{plain.__name__}", (plain,), {"__init__": build})


def _wrap_load(runner_class: Any, model_loaded: ModelLoaded) -> None:
    load_model = runner_class.load_model

    @functools.wraps(load_model)
    def observed_load(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        settings = settings_of(self.vllm_config)
        if settings is not None:
            setattr(self, STEP_HOOKS, model_loaded(LoadedEngine(self, self.vllm_config, settings)))

    runner_class.load_model = observed_load


def _wrap_warm_up(worker_class: Any) -> None:
    """Hides the hooks while a worker warms up: the second model runner then runs requests that nobody sent."""
    warm_up = worker_class.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def observed_warm_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner = vars(self.model_runner)
        hooks = runner.pop(STEP_HOOKS, None)
        try:
            return warm_up(self, *args, **kwargs)
        finally:
            if hooks is not None:
                runner[STEP_HOOKS] = hooks

    worker_class.compile_or_warm_up_model = observed_warm_up


def _wrap_steps(runner_class: Any, prepare_name: str, rows: Callable[..., BatchRows]) -> None:
    execute_model, prepare_inputs = runner_class.execute_model, getattr(runner_class, prepare_name)

    @functools.wraps(execute_model)
    def observed_execute(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = vars(self).get(STEP_HOOKS)
        # The second model runner's dummy runs come this way, too.
        if hooks is None or kwargs.get("dummy_run"):
            return execute_model(self, scheduler_output, *args, **kwargs)
        hooks.step_begins(scheduler_output.finished_req_ids, _new_requests(scheduler_output, self.max_model_len))
        try:
            result = execute_model(self, scheduler_output, *args, **kwargs)
        except BaseException:
            hooks.step_fails()
            raise
        hooks.step_ends()
        return result

    @functools.wraps(prepare_inputs)
    def observed_prepare(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare_inputs(self, scheduler_output, *args, **kwargs)
        hooks = vars(self).get(STEP_HOOKS)
        if hooks is not None and hooks.rows_wanted:
            hooks.rows_ordered(rows(self, scheduler_output, prepared))
        return prepared

    runner_class.execute_model = observed_execute
    setattr(runner_class, prepare_name, observed_prepare)


def _wrap_sampling(runner_class: Any) -> None:
    sample = runner_class._sample

    @functools.wraps(sample)
    def observed_sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        output = sample(self, logits, spec_decode_metadata)
        hooks = vars(self).get(STEP_HOOKS)
        if hooks is not None and spec_decode_metadata is not None:
            hooks.rows_sampled(output.sampled_token_ids.tolist())
        return output

    runner_class._sample = observed_sample


def _new_requests(scheduler_output: SchedulerOutput, max_model_len: int) -> Sequence[NewRequest]:
    """The requests that a step sees for the first time."""
    if not scheduler_output.scheduled_new_reqs:
        return ()
    return [
        _new_request(request, max_model_len)
        for request in scheduler_output.scheduled_new_reqs
        if request.prompt_token_ids is not None
    ]


def _new_request(request: Any, max_model_len: int) -> NewRequest:
    prompt_tokens, parameters = len(request.prompt_token_ids), request.sampling_params
    if parameters is None:
        return NewRequest(request.req_id, prompt_tokens, None)
    # As `check_stop` of vLLM's scheduler.
    stop_tokens = frozenset(parameters.stop_token_ids or ()) | {parameters.eos_token_id}
    longest = (
        max_model_len if parameters.max_tokens is None else min(max_model_len, prompt_tokens + parameters.max_tokens)
    )
    return NewRequest(request.req_id, prompt_tokens, parameters.extra_args, stop_tokens - {None}, longest - 2)


def step_hooks(model_runner: object) -> StepHooks | None:
    """What follows the steps of a model runner, None on engines without observation."""
    return vars(model_runner).get(STEP_HOOKS)


def _wrap_shutdown(runner_class: Any) -> None:
    shutdown = runner_class.shutdown

    @functools.wraps(shutdown)
    def observed_shutdown(self: Any) -> None:
        hooks = step_hooks(self)
        if hooks is not None:
            hooks.close()
        shutdown(self)

    runner_class.shutdown = observed_shutdown


def _rows_of_first_runner(model_runner: GPUModelRunner, scheduler_output: SchedulerOutput, prepared: Any) -> BatchRows:
    batch = model_runner.input_batch
    request_ids = batch.req_ids
    num_requests = len(request_ids)
    scheduled = scheduler_output.num_scheduled_tokens
    # Each request has a row at least: with as many rows as requests it is one.
    decoding = scheduler_output.total_num_scheduled_tokens == num_requests
    return BatchRows(
        request_ids,
        [1] * num_requests if decoding else [scheduled[request_id] for request_id in request_ids],
        batch.num_computed_tokens_cpu[:num_requests].tolist(),
        _num_drafts(request_ids, scheduler_output.scheduled_spec_decode_tokens),
    )


def _num_drafts(request_ids: Sequence[str], drafts: Mapping[str, Sequence[int]]) -> Sequence[int]:
    return [len(drafts.get(request_id, ())) for request_id in request_ids] if drafts else ()


def _rows_of_second_runner(model_runner: Any, scheduler_output: SchedulerOutput, prepared: Any) -> BatchRows:
    return BatchRows(prepared.req_ids, prepared.num_scheduled_tokens.tolist(), prepared.num_computed_tokens_np.tolist())
