"""The gate of the API server: it settles each request's plan and checks the arguments that observation reads.

The plan is settled once, when the request enters: a switch of the default never changes a request in flight, and two
plans never share a cached prefix, whose keys and values depend on the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from reap_serve.record.requests import PROMPT_ARGUMENT, SLICE_ARGUMENT
from reap_serve.serve.mask import PLAN_ARGUMENT
from reap_serve.slice_name import RULE, is_slice_name

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

PLAN_NAME_ARGUMENT = "reap_plan"
SALT_PREFIX = "reap-plan:"

ResolvePlan = Callable[[str | None], str | None]


class AdmissionError(ValueError):
    """The request's own arguments are wrong.

    Args:
        field: The one that is wrong, as a path in the body.
        problem: What is wrong with it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field


def admit(request: EngineCoreRequest, resolve: ResolvePlan) -> None:
    """Settles the plan of a request.

    Args:
        request: The request, owned by the engine.
        resolve: From the name that the request gives (None when it gives none) to the plan's id, None for the full
            model; raises KeyError for unknown names.

    Raises:
        AdmissionError: An argument is unknown, malformed or reserved.
    """
    parameters = request.sampling_params
    if parameters is None:
        return
    if (request.cache_salt or "").startswith(SALT_PREFIX):
        raise AdmissionError("cache_salt", f"begins with {SALT_PREFIX}, which is reserved")
    parameters.extra_args, plan = settle(parameters.extra_args, resolve)
    if plan is not None:
        request.cache_salt = f"{SALT_PREFIX}{plan}:{request.cache_salt or ''}"


def settle(given: Mapping[str, Any] | None, resolve: ResolvePlan) -> tuple[dict[str, Any] | None, str | None]:
    """The arguments for the engine, with the plan's id in place of its name, and that id.

    Raises:
        AdmissionError: An argument is unknown, malformed or reserved.
    """
    arguments = dict(given or {})
    _check_slice(arguments)
    if PLAN_ARGUMENT in arguments:
        raise AdmissionError(f"vllm_xargs.{PLAN_ARGUMENT}", f"is reserved; choose a plan by {PLAN_NAME_ARGUMENT}")
    name = arguments.pop(PLAN_NAME_ARGUMENT, None)
    if name is not None and not isinstance(name, str):
        raise AdmissionError(f"vllm_xargs.{PLAN_NAME_ARGUMENT}", "is not a string")
    try:
        plan = resolve(name)
    except KeyError:
        raise AdmissionError(f"vllm_xargs.{PLAN_NAME_ARGUMENT}", "names a plan that is not loaded") from None
    if plan is not None:
        arguments[PLAN_ARGUMENT] = plan
    return arguments or None, plan


def _check_slice(arguments: dict[str, Any]) -> None:
    name = arguments.get(SLICE_ARGUMENT)
    if name is not None and not is_slice_name(name):
        raise AdmissionError(f"vllm_xargs.{SLICE_ARGUMENT}", f"is not {RULE}")
    prompt_tokens = arguments.get(PROMPT_ARGUMENT)
    if prompt_tokens is not None and (
        not isinstance(prompt_tokens, int) or isinstance(prompt_tokens, bool) or prompt_tokens < 0
    ):
        raise AdmissionError(f"vllm_xargs.{PROMPT_ARGUMENT}", "is not a number of tokens")


def install_gate(engine_client: Any, resolve: ResolvePlan) -> None:
    """Puts the gate into a server's engine client: every endpoint's requests go through its input processor.

    `generate` is checked, too: it is called before a streaming answer has begun, so that the refusal is still a 400.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.utils.async_utils import make_async

    processor, generate = engine_client.input_processor, engine_client.generate
    process_inputs = processor.process_inputs

    def gated(*arguments: Any, **keywords: Any) -> Any:
        request = process_inputs(*arguments, **keywords)
        try:
            admit(request, resolve)
        except AdmissionError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None
        return request

    def checked_generate(*arguments: Any, **keywords: Any) -> Any:
        parameters = keywords.get("sampling_params", arguments[1] if len(arguments) > 1 else None)
        try:
            settle(getattr(parameters, "extra_args", None), resolve)
        except AdmissionError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None
        return generate(*arguments, **keywords)

    processor.process_inputs = gated
    processor.process_inputs_async = make_async(gated, executor=processor.renderer._executor)
    engine_client.generate = checked_generate
