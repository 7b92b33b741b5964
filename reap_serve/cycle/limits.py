"""Limits of a cycle: what must hold, in the language of `compare --fail-if` turned round.

`slices.*.quality.perplexity_ratio<1.05` must hold; `compare` fails where its opposite does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from reap_serve.compare.gate import Gate, failures, parse_gates
from reap_serve.compare.record import Report
from reap_serve.errors import RequestError

_OPPOSITE = {"<=": ">", ">=": "<", "<": ">=", ">": "<="}


def parse_limits(texts: Sequence[str], slices: Collection[str]) -> list[Gate]:
    """Gates that fail where a limit does not hold.

    Args:
        texts: Limits as the operator wrote them.
        slices: Names of the held-out traffic's slices.

    Raises:
        RequestError: A limit is not of the form, or names what no report has.
    """
    return parse_gates([_opposite(text) for text in texts], slices)


def broken(limits: Sequence[Gate], report: Report) -> list[str]:
    """What does not hold, one line each with its figure."""
    return failures(limits, report)


def _opposite(text: str) -> str:
    for sign, opposite in _OPPOSITE.items():
        path, found, number = text.partition(sign)
        if found:
            return f"{path}{opposite}{number}"
    raise RequestError(f"limit {text!r} is not PATH<NUMBER", "signs are > >= < <=")
