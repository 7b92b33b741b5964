"""Plans that a server is started with: from options to files by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from reap_serve.errors import RequestError
from reap_serve.plan.record import read_plan
from reap_serve.record.settings import BASE_PLAN
from reap_serve.serve.plan_check import check_plan, served_model

PLAN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def named_plan_files(named: Sequence[str], mask: Path | None) -> tuple[dict[str, str], str | None]:
    """Absolute paths of plan files by name, and the name of the plan for requests that choose none.

    Every file is read, so that a wrong one is refused before the engine starts. `mask` goes by its file's stem.

    Raises:
        RequestError: A name is malformed, reserved or given twice, or a file is no plan.
    """
    pairs = [each.partition("=") for each in named]
    if any(not separator for _, separator, _ in pairs):
        raise RequestError("--plan is not NAME=PLAN", "write for example --plan candidate=plan.json")
    chosen = [(name, Path(path)) for name, _, path in pairs]
    if mask is not None:
        chosen.append((re.sub(r"[^A-Za-z0-9._-]", "-", mask.stem), mask))
    files: dict[str, str] = {}
    for name, path in chosen:
        if not re.fullmatch(PLAN_NAME, name) or name == BASE_PLAN:
            raise RequestError(f"a plan cannot be called {name!r}", "use letters, digits, '.', '_' and '-'")
        if name in files:
            raise RequestError(f"two plans are called {name}", "give each a name of its own")
        read_plan(path)
        files[name] = str(path.resolve())
    return files, chosen[-1][0] if mask is not None else None


def require_fitting(model: str, files: Mapping[str, str]) -> None:
    """Refuses plans that do not fit a local model, before vLLM starts; the engine holds those of a hub id to it.

    Args:
        model: Model directory or hub id.
        files: Plan files by name, from `named_plan_files`.

    Raises:
        MismatchError: A plan is for another model.
        PlanError: The router could not choose from what a plan keeps.
    """
    if not files or not Path(model).is_dir():
        return
    served = served_model(model)
    for path in files.values():
        check_plan(read_plan(Path(path)), served, path)
