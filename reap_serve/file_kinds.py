"""The kinds of file that commands write, told by what is in a file: `--overwrite` replaces a file of its own kind only.

Text and numbers of a file are not checked here; whether it is whole is said by what reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

# What is read of a file to tell what it is: a plan of a large model has 10 MB.
MAX_BYTES = 100_000_000
STATISTICS_FORMAT = "reap_serve.statistics"
_BATCH_URLS = ("/v1/chat/completions", "/v1/completions")
_SVG_BEGINS = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 '
# A file of torch.save is a zip archive whose first member has this name, after a header of 30 bytes.
_TORCH_BEGINS, _TORCH_MEMBER, _TORCH_HEAD_BYTES = b"PK\x03\x04", b"/data.pkl", 128


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: With its article, for errors.
        matches: Whether an open file is of the kind.
    """

    name: str
    matches: Callable[[BinaryIO], bool]


def is_statistics(file: BinaryIO) -> bool:
    """Whether an open file begins as statistics do: a safetensors header whose metadata says so."""
    # Help and the options of commands need no more than the standard library: it brings pydantic.
    from reap_serve.weight_headers import read_beginning

    _, _, text = read_beginning(file, MAX_BYTES)
    metadata = _object(text or b"").get("__metadata__")
    return isinstance(metadata, dict) and metadata.get("format") == STATISTICS_FORMAT


def _is_plan(file: BinaryIO) -> bool:
    return {"schema_version", "model", "criterion", "layers"} <= _document(file).keys()


def _is_batch(file: BinaryIO) -> bool:
    line = _object(file.readline(MAX_BYTES))
    return (
        isinstance(line.get("custom_id"), str)
        and line.get("method") == "POST"
        and line.get("url") in _BATCH_URLS
        and isinstance(line.get("body"), dict)
    )


def _is_expert_lists(file: BinaryIO) -> bool:
    lists = _document(file).values()
    return bool(lists) and all(isinstance(ids, list) and ids and all(type(id_) is int for id_ in ids) for ids in lists)


def _is_torch(file: BinaryIO) -> bool:
    head = file.read(_TORCH_HEAD_BYTES)
    return head.startswith(_TORCH_BEGINS) and _TORCH_MEMBER in head


def _document(file: BinaryIO) -> dict[str, object]:
    content = file.read(MAX_BYTES + 1)
    return {} if len(content) > MAX_BYTES else _object(content)


def _object(content: bytes) -> dict[str, object]:
    """The JSON object in some bytes; empty where they are none."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


PLAN = FileKind("a plan", _is_plan)
STATISTICS = FileKind("a statistics file", is_statistics)
BATCH = FileKind("a file of OpenAI Batch lines", _is_batch)
PICTURE = FileKind("a picture of a plan", lambda file: file.read(len(_SVG_BEGINS)) == _SVG_BEGINS)
REPLAY_REPORT = FileKind(
    "a report of a replay", lambda file: _document(file).keys() == {"version", "run", "scenario", "results"}
)
SUBSPACE = FileKind(
    "an analysis of subspaces",
    lambda file: {"schema_version", "layers", "bounds", "provenance"} <= _document(file).keys(),
)
EXPERT_LISTS = FileKind("a report of llm-compressor", _is_expert_lists)
OBSERVER_STATE = FileKind("an observer file", _is_torch)
