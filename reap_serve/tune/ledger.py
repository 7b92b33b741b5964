"""What a run has measured so far, beside its output, so that a run that was stopped goes on.

A folder `.<output>.tune` holds `ledger.jsonl` (figures by what was measured), the statistics and the sums of each round
of trials: divergences by request, else aggregates; no text, no token, no gate of a single one. It belongs to one
request of the user, by a digest of all that decides the result but the budget; another one begins anew. It is removed
when the output stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from reap_serve import __version__
from reap_serve.errors import StorageError
from reap_serve.model import Fingerprint
from reap_serve.publish import write_file
from reap_serve.records import JsonValue
from reap_serve.tune.request import TuneRequest

_NOT_DECIDING = ("requests", "output", "budget", "overwrite", "model", "statistics")


def digest(request: TuneRequest, model: Fingerprint) -> str:
    """Stands for everything that decides the result but the budget; another release's ledger is of another form."""
    content = hashlib.sha256(__version__.encode())
    settings = {name: repr(getattr(request, name)) for name in request.__slots__ if name not in _NOT_DECIDING}
    content.update(json.dumps([model.model_dump(mode="json"), settings], sort_keys=True).encode())
    for path in request.statistics:
        content.update(Path(path).read_bytes() if Path(path).is_file() else path.encode())
    for entry in request.requests:
        content.update(json.dumps([entry.slice, entry.session, entry.body, entry.answer], default=str).encode())
    return content.hexdigest()


class Ledger:
    """See the module.

    Args:
        output: The output that the run will write.
        key: Of `digest`.

    Attributes:
        resumed: Whether a run of the same request was stopped here.
        seconds_before: Time that the stopped runs took.
        folder: Where files of the run lie.

    Raises:
        StorageError: The disk refused.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.folder = output.parent / f".{output.name}.tune"
        self._path = self.folder / "ledger.jsonl"
        self._entries: dict[str, JsonValue] = {}
        self.seconds_before = 0.0
        self.resumed = self._read(key)
        if self.resumed:
            return
        self._entries, self.seconds_before = {}, 0.0
        try:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be made: {error.strerror}", "give another output") from None
        self._append({"request": key})

    def get(self, name: str) -> JsonValue:
        """What was noted under a name; None when nothing was."""
        return self._entries.get(name)

    def put(self, name: str, value: JsonValue, seconds: float) -> None:
        """Notes a value, and how long the run has taken until now."""
        self._entries[name] = value
        self._append({"name": name, "value": value, "seconds": round(seconds, 3)})

    def read_bytes(self, name: str) -> bytes | None:
        """A file of the run; None when it is not there."""
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def write_bytes(self, name: str, content: bytes) -> None:
        """A file of the run, whole or not at all."""
        write_file(self.folder / name, content, overwrite=True)

    def close(self) -> None:
        """Removes everything: the output stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, line: Mapping[str, JsonValue]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror}", "free space") from None

    def _read(self, key: str) -> bool:
        """Whether there is a ledger of this request; a last line that was cut short is passed over."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return False
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        if not found or found[0].get("request") != key:
            return False
        for entry in found[1:]:
            self._entries[entry["name"]] = entry["value"]
            self.seconds_before = max(self.seconds_before, entry["seconds"])
        if len(found) < len(lines):
            content = "".join(json.dumps(entry) + "\n" for entry in found)
            write_file(self._path, content.encode(), overwrite=True)
        return True
