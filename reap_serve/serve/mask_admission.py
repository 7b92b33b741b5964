"""Admission to the API server: it settles each request's plan and checks the arguments that observation reads.

The plan is settled once, when the request enters: a switch of the default never changes a request in flight, and two
plans never share a cached prefix, whose keys and values depend on the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reap_serve.adapter.server import AdmissionError
from reap_serve.record.requests import PROMPT_ARGUMENT, SLICE_ARGUMENT
from reap_serve.serve.mask import PLAN_ARGUMENT
from reap_serve.slice_name import RULE, is_slice_name

PLAN_NAME_ARGUMENT = "reap_plan"
SALT_PREFIX = "reap-plan:"

ResolvePlan = Callable[[str | None], str | None]


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
