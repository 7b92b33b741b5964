"""The base of every record that enters or leaves as JSON, and the provenance that each carries."""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import TypeAliasType

from reap_serve import __version__
from reap_serve.errors import InputFileError

# No configuration, index or plan comes near; it bounds the memory that a foreign file can take.
MAX_JSON_BYTES = 256 << 20
MAX_DEPTH = 100
# A record of ours has a dozen levels; each level more multiplies what its validation costs.
MAX_RECORD_DEPTH = 20
# Marks a number that json would not write; no text that comes from JSON holds it by chance.
BEYOND_FLOATS = "reap-serve: a number beyond floats: 5d1f8c52"

RecordT = TypeVar("RecordT", bound="Record")

if TYPE_CHECKING:
    JsonValue = str | int | float | bool | None | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
else:
    # pydantic resolves an alias that refers to itself only by name, mypy only as a plain one.
    JsonValue = TypeAliasType(
        "JsonValue", str | int | float | bool | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
    )


class Record(BaseModel):
    """A frozen record; unknown keys are an error, not a silent no-op."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(Record):
    """A record that is a file of its own and so outlives the release that wrote it.

    Its version rises when an older release would misread it; a field that came later has a default, so that the files
    of every earlier version are read.

    Attributes:
        schema_version: Of the file's form, from 1 on.
    """

    newest_version: ClassVar[int] = 1

    schema_version: int

    @model_validator(mode="before")
    @classmethod
    def _require_known_version(cls, value: object) -> object:
        # Before all else: of an unknown form any other complaint would mislead.
        version = value.get("schema_version") if isinstance(value, Mapping) else None
        if version is not None and (problem := version_problem(version, cls.newest_version)) is not None:
            raise ValueError(problem)
        return value


def version_problem(version: object, newest: int) -> str | None:
    """What is wrong with a file's schema version, None when this release reads it."""
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        return f"{str(version)[:40]!r} is no schema version"
    if version > newest:
        readable = "version 1" if newest == 1 else f"versions 1 to {newest}"
        return f"it has schema version {version}, this release reads {readable}"
    return None


class Provenance(Record):
    """What made a file, and when.

    Attributes:
        created: UTC time, ISO 8601, seconds.
        tool: `reap-serve <version>`.
        python: Version of the interpreter.
        packages: Versions of the packages that shape the result; absent ones are left out.
    """

    created: str
    tool: str
    python: str
    packages: dict[str, str]


def provenance(packages: Sequence[str] = ()) -> Provenance:
    """Provenance of a file made now by this process."""
    versions = {name: _installed_version(name) for name in packages}
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=f"reap-serve {__version__}",
        python=platform.python_version(),
        packages={name: version for name, version in versions.items() if version is not None},
    )


@functools.cache
def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def strict_json(value: JsonValue, indent: int | None = None) -> bytes:
    """JSON that every reader takes, with a newline at its end.

    JSON has no infinity and no NaN: an infinite number becomes one beyond every float, `1e999`, which Python, C and
    JavaScript read as infinite, and NaN becomes null. Text stays readable, but for halves of a surrogate pair, which
    UTF-8 cannot hold and which stay escaped.
    """
    finite = _without_special_floats(value)
    text = json.dumps(finite, indent=indent, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(finite, indent=indent, allow_nan=False)
    return (text.replace(f'"{BEYOND_FLOATS}', "").replace(f'{BEYOND_FLOATS}"', "") + "\n").encode()


def _without_special_floats(value: JsonValue) -> JsonValue:
    if isinstance(value, float) and not math.isfinite(value):
        sign = "-" if value < 0 else ""
        return None if math.isnan(value) else f"{BEYOND_FLOATS}{sign}1e999{BEYOND_FLOATS}"
    if isinstance(value, Mapping):
        return {key: _without_special_floats(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_special_floats(each) for each in value]
    return value


def read_json_object(path: Path) -> dict[str, JsonValue]:
    """The JSON object in a file.

    Raises:
        InputFileError: The file is missing, not UTF-8, not JSON, not an object, nested too deeply or too large.
    """
    try:
        with path.open("rb") as handle:
            content = handle.read(MAX_JSON_BYTES + 1)
        if len(content) > MAX_JSON_BYTES:
            raise InputFileError(
                f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB", "give the file that the tool wrote"
            )
        value = json.loads(content)
    except FileNotFoundError:
        raise InputFileError(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from None
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} is not JSON: {error}", "give the file that the tool wrote") from None
    if not isinstance(value, dict):
        raise InputFileError(f"{path} holds a JSON {type(value).__name__}, not an object", "check the path")
    if depth_of(value) > MAX_DEPTH:
        raise InputFileError(f"{path} is nested deeper than {MAX_DEPTH} levels", "give the file that the tool wrote")
    return value


def depth_of(value: JsonValue) -> int:
    """How deeply a document is nested, found without recursion and not counted beyond the limit."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return depth


def has_special_floats(value: JsonValue) -> bool:
    """Whether a document holds a number that JSON has not: NaN or an infinite one."""
    if isinstance(value, Mapping):
        return any(has_special_floats(each) for each in value.values())
    if isinstance(value, list | tuple):
        return any(has_special_floats(each) for each in value)
    return isinstance(value, float) and not math.isfinite(value)


def read_record(path: Path, record: type[RecordT], what: str) -> RecordT:
    """The record in a JSON file.

    Args:
        path: The file.
        record: Its type.
        what: How to call it in the error, such as `plan`.

    Raises:
        InputFileError: The file is missing, unreadable, not JSON, of a later version, or not such a record, or a number
            in it is not finite.
    """
    value = read_json_object(path)
    if issubclass(record, FileRecord) and (found := value.get("schema_version")) is not None:
        problem = version_problem(found, record.newest_version)
        if problem is not None:
            raise InputFileError(f"{path}: {problem}", "use the release of reap-serve that wrote it")
    if depth_of(value) > MAX_RECORD_DEPTH:
        raise InputFileError(f"{path} is nested deeper than {MAX_RECORD_DEPTH} levels", f"make the {what} again")
    if has_special_floats(value):
        raise InputFileError(f"{path} holds a number that is not finite", f"make the {what} again or mend it")
    try:
        return record.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise InputFileError(
            f"{path} is not a valid {what}: {place}: {first['msg']} ({error.error_count()} problems)",
            f"make the {what} again or mend that field",
        ) from None
