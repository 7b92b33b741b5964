"""The directory of a cycle: what `ls` shows is the state.

    STATE/
      lock                     held while a cycle runs
      decision.json            the last decision
      runs/<time>-<digest>/    one run; its digest is of everything that decides it
        inputs.json            the statistics files that were there, what was served, the configuration
        windows.safetensors    the collected statistics
        drift.json             what moved since the plan in use was made
        tune/                  the choice of a plan, where tune makes it: report.json, report.html
        plan.json              the chosen plan
        trial/                 the plan as a mask on the held-out requests: report.json, report.html
        candidate/             the pruned checkpoint
        verify.json            what verify said of it
        comparison/            the checkpoint against the base: report.json, report.html
        decision.json          the end of the run; a run without it goes on where it was

Each of them is there whole or not at all, so a step whose output is there is not done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from reap_serve.errors import StorageError
from reap_serve.publish import write_file
from reap_serve.records import FileRecord, Provenance, Record, read_record

SCHEMA_VERSION = 1
DECISION_NAME = "decision.json"
INPUTS_NAME = "inputs.json"


class SourceFile(Record):
    """A statistics file that a run collects.

    Attributes:
        path: Local path or URL.
        windows: Ids of its windows.
    """

    path: str
    windows: tuple[str, ...]


class Inputs(FileRecord):
    """What decides a run; the same inputs give the same run.

    Attributes:
        schema_version: Of this record.
        started: UTC time at which the run began, ISO 8601; ages are counted from it.
        config_sha256: Of the configuration.
        traffic_sha256: Of the files of requests.
        served: Path of the checkpoint or plan in use; None for the base.
        served_sha256: Of its plan.
        files: The statistics.
        files_older: Statistics files left out for their age.
        files_of_other_models: Statistics files left out since they are of another model.
        provenance: What made the run.
    """

    started: str
    config_sha256: str
    traffic_sha256: str
    served: str | None
    served_sha256: str | None
    files: tuple[SourceFile, ...]
    files_older: int
    files_of_other_models: int
    provenance: Provenance

    def asks_the_same(self, other: Inputs) -> bool:
        """Whether the statistics alone differ."""
        keys = ("config_sha256", "traffic_sha256", "served_sha256")
        return all(getattr(self, key) == getattr(other, key) for key in keys)

    def digest(self) -> str:
        """SHA-256 of what decides, without times and provenance."""
        deciding = self.model_dump(mode="json", exclude={"started", "provenance", "files_older", "schema_version"})
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


class Decision(FileRecord):
    """How a run ended.

    Attributes:
        schema_version: Of this record.
        decision: `nothing` to do, `candidate` is ready, or `refused` by a limit.
        reason: Why, in one sentence with the numbers.
        candidate: The checkpoint; None without one.
        report: The report to read; None without one.
        run: The run's directory.
        experts_kept: Per layer, by the chosen plan, else by the plan in use; None where neither is.
        gate_mass_rise: How much the dropped share of the gate weight rose on the slice where it rose most; None where
            no plan was in use.
        trial_kl: Mean KL divergence from the base of the chosen plan as a mask, by slice, in nats.
        regained: By slice, how much of it the new plan takes back from the plan in use; None where there was none.
        provenance: What decided.
    """

    decision: Literal["nothing", "candidate", "refused"]
    reason: str
    candidate: str | None
    report: str | None
    run: str
    experts_kept: int | None = None
    gate_mass_rise: float | None = None
    trial_kl: dict[str, float] | None = None
    regained: dict[str, float] | None = None
    provenance: Provenance


class State:
    """The runs of one cycle."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._runs = root / "runs"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the cycle's lock; the system frees it when the process dies.

        Raises:
            StorageError: Another cycle runs, or the directory cannot be written.
        """
        try:
            self._runs.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "lock")
            lock.acquire(blocking=False)
        except Timeout:
            raise StorageError(f"another cycle runs in {self.root}", "wait until it has ended") from None
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be written: {error.strerror}", "make it writable, or give another state"
            ) from None
        try:
            for path in self._runs.glob(".*.removed"):
                shutil.rmtree(path, ignore_errors=True)
            yield
        finally:
            lock.release()

    def runs(self) -> list[Path]:
        """The runs' directories, the newest first."""
        shown = (path for path in self._runs.iterdir() if not path.name.startswith("."))
        return sorted((path for path in shown if (path / INPUTS_NAME).exists()), reverse=True)

    def decided(self) -> list[tuple[Path, Decision]]:
        """The runs that ended, the newest first."""
        found = ((path, self.decision_of(path)) for path in self.runs())
        return [(path, decision) for path, decision in found if decision is not None]

    def inputs_of(self, run: Path) -> Inputs:
        """What decides a run."""
        return read_record(run / INPUTS_NAME, Inputs, "run's inputs")

    def decision_of(self, run: Path) -> Decision | None:
        """How a run ended; None while it has not."""
        path = run / DECISION_NAME
        return read_record(path, Decision, "decision") if path.exists() else None

    def begin(self, inputs: Inputs) -> Path:
        """The directory of a new run."""
        # Names sort by time; two runs may begin in one second.
        moment = datetime.fromisoformat(inputs.started).strftime("%Y%m%dT%H%M%S.%f")[:-3]
        path = self._runs / f"{moment}Z-{inputs.digest()[:12]}"
        write_record(path / INPUTS_NAME, inputs)
        return path

    def end(self, decision: Decision) -> Decision:
        """Ends a run: its decision is written there, then at the top."""
        run = Path(decision.run)
        # A kill between two renames leaves an empty stage behind that no step looks for again.
        for leftover in run.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        write_record(run / DECISION_NAME, decision)
        return self.show(decision)

    def show(self, decision: Decision) -> Decision:
        """Makes a decision the last one."""
        write_record(self.root / DECISION_NAME, decision)
        return decision

    def forget(self, run: Path) -> None:
        """Removes a run."""
        remove_tree(run)


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON, whole or not at all."""
    write_file(path, (record.model_dump_json(indent=1) + "\n").encode(), overwrite=True)


def remove_tree(path: Path) -> None:
    """Removes a directory so that a kill leaves it there whole or under a name that no one reads.

    Raises:
        StorageError: It cannot be renamed.
    """
    doomed = path.with_name(f".{path.name}.removed")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    except OSError as error:
        raise StorageError(f"{path} cannot be removed: {error.strerror}", "check its permissions") from None
    shutil.rmtree(doomed, ignore_errors=True)
