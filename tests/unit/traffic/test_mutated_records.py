"""2,000 mutated records per format: each is a sound request or counted as malformed; nothing else comes out."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_traffic_formats import FIXTURES, FORMAT_OF
from traffic_records import identity

from reap_serve.traffic.convert import batch_line
from reap_serve.traffic.read import read_traffic

RECORDS_PER_EXAMPLE = 100
EXAMPLES = 20
# As text, so that every use has its own lists and objects.
_ODD_VALUES = (
    '[null, true, 0, -1, 1e308, 1180591620717411303424, "", "x", "\\u0000", "nan", [], {}, [[]], [{}], {"": null}]'
)


def records(name: str) -> list[bytes]:
    content = (FIXTURES / name).read_bytes()
    if name == "sharegpt.json":
        return [json.dumps(item).encode() for item in json.loads(content)]
    return content.splitlines()[1:] if name.endswith(".csv") else content.splitlines()


def mutated(record: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.3 or not record.startswith(b"{"):
        return mutated_bytes(record, generator)
    document = json.loads(record)
    for _ in range(generator.randint(1, 3)):
        mutate_value(document, generator)
    return json.dumps(document).encode()


def mutated_bytes(record: bytes, generator: random.Random) -> bytes:
    changed = bytearray(record)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(changed) + 1)
        match generator.randrange(4):
            case 0:
                del changed[at : at + generator.randint(1, 8)]
            case 1:
                changed[at:at] = bytes(generator.choices(b'{}[]",:\\\xff\x00\r1e', k=generator.randint(1, 3)))
            case 2:
                changed[at:at] = changed[:at]
            case _:
                del changed[at:]
    return bytes(changed).replace(b"\n", b" ")


def mutate_value(document: object, generator: random.Random) -> None:
    """Replaces, removes or adds a value somewhere in a JSON document."""
    node = document
    while True:
        if isinstance(node, dict) and node:
            key: object = generator.choice(list(node))
        elif isinstance(node, list) and node:
            key = generator.randrange(len(node))
        else:
            return
        child = node[key]  # type: ignore[index]
        if isinstance(child, (dict, list)) and child and generator.random() < 0.8:
            node = child
            continue
        if generator.random() < 0.3:
            del node[key]  # type: ignore[attr-defined]
        else:
            node[key] = generator.choice(json.loads(_ODD_VALUES))  # type: ignore[index]
        return


@pytest.mark.parametrize("name", FORMAT_OF)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_mutated_records(name: str, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    originals = records(name)
    lines = [mutated(generator.choice(originals), generator) for _ in range(RECORDS_PER_EXAMPLE)]
    header = (FIXTURES / name).read_bytes().splitlines()[:1] if name.endswith(".csv") else []
    path, again = tmp_path / "mutated", tmp_path / "again"
    # A sound record first: traffic without any request is an error of its own.
    path.write_bytes(b"\n".join([*header, originals[0], *lines]))
    options = {"format": FORMAT_OF[name], "skip_malformed": True, "require_text": False}
    found = [request for request in read_traffic([str(path)], **options) if request.has_text]
    again.write_text("".join(json.dumps(batch_line(request)) + "\n" for request in found))
    if found:
        assert [identity(request) for request in read_traffic([str(again)])] == [identity(item) for item in found]
