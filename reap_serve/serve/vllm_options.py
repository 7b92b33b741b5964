"""Options of `vllm serve` as its parser understands them, for what has to be known of them before it reads them.

Source: `vllm.utils.argparse_utils.FlexibleArgumentParser`. Underscores up to the first dot or `=` are dashes, a name
may be abbreviated, a value follows or stands behind `=`, and `--option.key value` sets a key of an option of JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from reap_serve.records import JsonValue

HIDDEN = "***"
# Last words of names whose values are secrets, and the options of vLLM that hold one by another name.
_SECRET_WORDS = frozenset(
    {
        "key",
        "keys",
        "token",
        "password",
        "passwd",
        "passphrase",
        "secret",
        "secrets",
        "credential",
        "credentials",
    }
)
_SECRET_OPTIONS = ("--api-key", "--hf-token", "--ssl-keyfile-password", "--watermark-config")
# In full it is a path; it begins the name of a secret.
_PLAIN_OPTIONS = frozenset({"--ssl-keyfile"})
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def option_name(argument: str) -> str | None:
    """The name of the option that an argument begins, without value and keys and with dashes; None for others."""
    if not argument.startswith("--") or len(argument) == 2:
        return None
    return re.split(r"[.=]", argument, maxsplit=1)[0].replace("_", "-")


def is_option(argument: str, option: str, shortest: str) -> bool:
    """Whether an argument names an option, in full or abbreviated to no less than `shortest`."""
    name = option_name(argument)
    return name is not None and name.startswith(shortest) and option.startswith(name)


def redacted(arguments: Sequence[str]) -> list[str]:
    """The arguments as a log may show them: the values of secrets are `***`."""
    shown: list[str] = []
    secret = False
    for argument in arguments:
        if option_name(argument) is not None:
            secret = _is_secret(argument)
            name, separator, value = argument.partition("=")
            if separator:
                argument = f"{name}={HIDDEN if secret else _value(value)}"
        # An option may take several values.
        elif secret and not argument.startswith("-"):
            argument = HIDDEN
        else:
            secret = False
            argument = _value(argument)
        shown.append(argument)
    return shown


def keys_of_config(arguments: Sequence[str]) -> tuple[str, ...]:
    """Names of the options that the YAML file of `--config` sets, as on the command line; none where it is unreadable.

    vLLM puts them before the options of the command line, which win.
    """
    import yaml

    if "--config" not in arguments[:-1]:
        return ()
    try:
        content = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        # vLLM says what is wrong with it.
        return ()
    return tuple(f"--{key}" for key in content) if isinstance(content, dict) else ()


def _is_secret(argument: str) -> bool:
    name = option_name(argument) or ""
    if name in _PLAIN_OPTIONS:
        return False
    path = argument.partition("=")[0]
    return _is_secret_name(path) or any(option.startswith(name) for option in _SECRET_OPTIONS)


def _is_secret_name(name: str) -> bool:
    return re.split(r"[-_.]", name.rstrip("+"))[-1].lower() in _SECRET_WORDS


def _value(text: str) -> str:
    """A value without the secrets in it: those of a JSON object by their keys, and the user of a URL."""
    if text.startswith(("{", "[")):
        try:
            return json.dumps(_without_secrets(json.loads(text)))
        except (ValueError, RecursionError):
            pass
    return _USER_INFO.sub(HIDDEN, text)


def _without_secrets(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret_name(key) else _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return _USER_INFO.sub(HIDDEN, value) if isinstance(value, str) else value
