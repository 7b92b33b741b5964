"""What `verify` reports."""

from __future__ import annotations

from typing import Literal

from reap_serve.records import Record


class Finding(Record):
    """One thing that is not as it should be.

    Attributes:
        severity: `error` makes the checkpoint unsound, `warning` does not.
        check: Name of the check.
        detail: What is wrong, with names and numbers.
    """

    severity: Literal["error", "warning"]
    check: str
    detail: str


class VerifyReport(Record):
    """The verdict on a checkpoint.

    Attributes:
        sound: No finding is an error.
        findings: In the order of the checks.
    """

    sound: bool
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, findings: list[Finding]) -> VerifyReport:
        """The verdict that follows from findings."""
        return cls(sound=all(finding.severity != "error" for finding in findings), findings=tuple(findings))


def error(check: str, detail: str) -> Finding:
    """A finding that makes the checkpoint unsound."""
    return Finding(severity="error", check=check, detail=detail)


def warning(check: str, detail: str) -> Finding:
    """A finding that does not make the checkpoint unsound."""
    return Finding(severity="warning", check=check, detail=detail)
