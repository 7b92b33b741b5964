"""Renders chat templates, one a line, with bounded memory; runs alone, as `own_template.TemplateSandbox` starts it.

The environment is that of transformers (`transformers.utils.chat_template_utils`): sandboxed, with loop controls,
`raise_exception`, `strftime_now` and a `tojson` that escapes no HTML.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **keywords: object) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _rendered(call: dict[str, object], max_characters: int) -> dict[str, str]:
    try:
        template = _environment().from_string(str(call["template"]))
        text = template.render(call["variables"])
    except MemoryError:
        return {"error": "memory"}
    except Exception as error:  # noqa: BLE001 - a stranger's code fails in any way
        # The kind alone: a message may quote the traffic.
        return {"error": type(error).__name__}
    return {"text": text} if len(text) <= max_characters else {"error": "length"}


def main() -> None:
    """Answers each line of stdin by one on stdout, after an empty one that says that it is ready."""
    memory_bytes, max_characters = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # It writes no file.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.stdout.write("\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_rendered(json.loads(line), max_characters)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
