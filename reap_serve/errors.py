"""Every failure that a user can meet, in one tree.

    ReapServeError
    ├── RequestError            exit 2: the request is wrong
    │   ├── InputFileError      a file is missing, unreadable, truncated or of another version
    │   ├── TrafficError        a line of traffic is malformed or of a kind that the command cannot use
    │   ├── ArchitectureError   the model's family is unknown, or the model is dense
    │   ├── MismatchError       two inputs belong to different models
    │   ├── PlanError           no plan can meet the limits
    │   └── OutputExistsError   the output is there already and --overwrite was not given
    └── ExecutionError          exit 1: the world said no
        ├── EngineError         vLLM failed to start or to answer
        ├── StorageError        disk full, unwritable, or changed underneath
        └── ThresholdError      a candidate crosses a threshold that the user set

The command line prints one line, `error: <what>; <remedy>`, and exits with `exit_code`.
"""

from __future__ import annotations

from reap_serve.shown_text import shown


class ReapServeError(Exception):
    """An expected failure.

    Args:
        what: What is wrong, with the numbers and the place.
        remedy: What the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return shown(" ".join(f"{self.what}; {self.remedy}".split()))


class RequestError(ReapServeError):
    """The request is wrong: bad option, unreadable file, unknown architecture, impossible plan."""

    exit_code = 2


class InputFileError(RequestError):
    """A file is missing, unreadable, corrupt or of an unsupported version."""


class TrafficError(RequestError):
    """A line of traffic is malformed, or the traffic is of a kind the command cannot use."""


class ArchitectureError(RequestError):
    """The model's family is unknown, or the model has no routed experts."""


class MismatchError(RequestError):
    """Two inputs belong to different models."""


class PlanError(RequestError):
    """No plan can meet the request and the limits of model and engine."""


class OutputExistsError(RequestError):
    """The output exists and `--overwrite` was not given."""


class ExecutionError(ReapServeError):
    """It could not be done: the engine, the disk or a check said no."""


class EngineError(ExecutionError):
    """vLLM failed to start, stopped, or answered with an error."""


class StorageError(ExecutionError):
    """The disk is full, unwritable, or a source changed while it was read."""


class ThresholdError(ExecutionError):
    """A comparison meets a condition under which the user wants it to fail."""
