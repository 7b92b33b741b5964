"""What a slice of traffic may be called: one rule, wherever a name enters.

Names come from strangers (a request's metadata, a recorded line, a file) and go to an operator's terminal, to metrics
and into the names of tensors. So they are short and printable: no control character, no line break, no lone surrogate,
no mark that changes the direction of writing.
"""

from __future__ import annotations

from typing import Annotated, TypeGuard

from pydantic import AfterValidator

MAX_CHARACTERS = 64
RULE = f"1 to {MAX_CHARACTERS} printable characters"


def is_slice_name(name: object) -> TypeGuard[str]:
    """Whether a value can name a slice: text of 1 to 64 characters, all of them printable (`str.isprintable`)."""
    return isinstance(name, str) and 0 < len(name) <= MAX_CHARACTERS and name.isprintable()


def _checked(name: str) -> str:
    if not is_slice_name(name):
        raise ValueError(f"a slice's name is not {RULE}")
    return name


SliceName = Annotated[str, AfterValidator(_checked)]
