"""Damage to documents and files that gets past the first check: the shape stays, a value, a name or a size does not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

HOSTILE_TEXTS = (
    "",
    "[/x]",
    "a[red]b",
    "\x1b[31mred\x1b]0;title\x07",
    "\x00",
    "a\nerror: forged; nothing",
    "\u202eabc",
    "\ud800",
    "x" * 250,
    "x" * 5000,
    "../../outside",
    "/etc/passwd",
    "model.layers.0.mlp.experts",
    "NaN",
    "{{ 9 ** 9 }}",
    "=HYPERLINK(1)",
    "%s%n{0}{a.b}",
)
HOSTILE_NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    255,
    65536,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**40,
    0.5,
    -0.0,
    1e-320,
    1e150,
    1e300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)
HOSTILE_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"": None}, *HOSTILE_NUMBERS)

Replace = Callable[[Any], None]


def nodes(value: Any, replace: Replace | None = None) -> list[tuple[Any, Replace | None]]:
    """Every value of a document, with what puts another one in its place; the document itself has none."""
    found = [(value, replace)]
    if isinstance(value, dict):
        for key in list(value):
            found += nodes(value[key], lambda new, key=key: value.__setitem__(key, new))  # type: ignore[misc]
    elif isinstance(value, list):
        for index in range(len(value)):
            found += nodes(value[index], lambda new, index=index: value.__setitem__(index, new))  # type: ignore[misc]
    return found


def mutated_document(document: Any, random_: random.Random) -> Any:
    """The document with one to three values damaged."""
    document = json.loads(json.dumps(document))
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        value, replace = random_.choice(nodes(document)[1:] or [(document, None)])
        if replace is None:
            return random_.choice(HOSTILE_VALUES)
        _damage(value, replace, document, random_)
    return document


def _damage(value: Any, replace: Replace, document: Any, random_: random.Random) -> None:
    kind = random_.random()
    if kind < 0.15:
        replace(random_.choice(HOSTILE_VALUES))
    elif kind < 0.25:
        # Another part of the same document: of the right kind in the wrong place.
        replace(json.loads(json.dumps(random_.choice(nodes(document))[0])))
    elif kind < 0.3:
        deep: Any = value
        for _ in range(random_.choice((2, 50, 900, 3000))):
            deep = [deep]
        replace(deep)
    elif isinstance(value, dict) and value:
        key = random_.choice(list(value))
        if kind < 0.5:
            del value[key]
        elif kind < 0.75:
            value[random_.choice(HOSTILE_TEXTS)] = value.pop(key)
        else:
            value[random_.choice(HOSTILE_TEXTS)] = value[key]
    elif isinstance(value, list) and value:
        index = random_.randrange(len(value))
        if kind < 0.5:
            del value[index]
        elif kind < 0.7:
            value.insert(index, value[index])
        elif kind < 0.8:
            random_.shuffle(value)
        elif kind < 0.9:
            value *= 300
        else:
            value[index] = random_.choice(HOSTILE_VALUES)
    elif isinstance(value, bool) or value is None:
        replace(not value)
    elif isinstance(value, int | float):
        replace(random_.choice((*HOSTILE_NUMBERS, value + 1, value - 1, -value, value * 2, str(value), float(value))))
    elif isinstance(value, str):
        hostile = random_.choice(HOSTILE_TEXTS)
        position = random_.randrange(len(value) + 1)
        replace(random_.choice((hostile, value + hostile, value[:position] + hostile + value[position:], value[:-1])))
    else:
        replace(random_.choice(HOSTILE_VALUES))


def document_bytes(document: Any, random_: random.Random) -> bytes:
    """JSON, as a tool would write it, now and then with a syntax that few readers take."""
    if random_.random() < 0.05:
        return mutated_bytes(_json(document), random_)
    return _json(document)


def _json(document: Any) -> bytes:
    return _dumps(document).encode("utf-8", "surrogatepass")


def _dumps(value: Any) -> str:
    """`json.dumps`, also of what is nested deeper than Python recurses."""
    try:
        return json.dumps(value)
    except RecursionError:
        depth = 0
        while isinstance(value, list) and len(value) == 1:
            value, depth = value[0], depth + 1
        try:
            return "[" * depth + json.dumps(value) + "]" * depth
        except RecursionError:
            return "[" * 5000


def mutated_bytes(content: bytes, random_: random.Random) -> bytes:
    """The bytes with one to four of them, or a stretch, damaged."""
    changed = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        position = random_.randrange(len(changed) + 1)
        kind = random_.randrange(5)
        if kind == 0 and changed:
            changed[position % len(changed)] ^= 1 << random_.randrange(8)
        elif kind == 1:
            changed[position:position] = random_.randbytes(random_.randint(1, 9))
        elif kind == 2:
            del changed[position : position + random_.randint(1, 40)]
        elif kind == 3:
            del changed[position:]
        else:
            changed[position:position] = changed[position : position + random_.randint(1, 200)]
    return bytes(changed)


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes, random_: random.Random) -> bytes:
    """A file that announces the header's true length, so that the header is read; seldom another."""
    text = _json(header)
    length = (
        len(text) if random_.random() < 0.97 else random_.choice((0, 1, len(text) - 1, len(text) + 9, 2**40, 2**63))
    )
    return length.to_bytes(8, "little") + text + data
