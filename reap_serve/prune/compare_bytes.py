"""Whether the tensors of a pruned checkpoint are those of its source, byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from reap_serve.prune.checkpoint import Checkpoint
from reap_serve.prune.decide import Action, Decision
from reap_serve.prune.findings import Finding, error
from reap_serve.prune.layout import coalesced, extents
from reap_serve.prune.stopping import until_left
from reap_serve.weight_headers import Tensor, open_regular

BUFFER_BYTES = 4 << 20


def compare_tensors(
    decisions: Sequence[Decision],
    source: Checkpoint,
    output: Checkpoint,
    jobs: int,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Iterator[Finding]:
    """Compares names, dtypes, shapes, then every byte; memory is two buffers a job."""
    wanted = {each.name: each for each in decisions if each.action is not Action.DROP}
    for name in sorted(set(wanted) - set(output.tensors)):
        yield error("missing", f"{name} is missing")
    for name in sorted(set(output.tensors) - set(wanted)):
        yield error("surplus", f"{name} is in no way part of the source and the plan")
    pairs: dict[tuple[str, str], list[tuple[Decision, Tensor]]] = {}
    for name, decision in wanted.items():
        found = output.tensors.get(name)
        if found is None:
            continue
        if (found.dtype, found.shape) != (decision.tensor.dtype, decision.shape):
            yield error(
                "shapes",
                f"{name} is {found.dtype} {list(found.shape)}, expected {decision.tensor.dtype} {list(decision.shape)}",
            )
            continue
        pairs.setdefault((decision.tensor.file, found.file), []).append((decision, found))

    def compare(item: tuple[tuple[str, str], list[tuple[Decision, Tensor]]]) -> list[Finding]:
        (source_file, output_file), group = item
        left = open_regular(source.directory / source_file)
        right = open_regular(output.directory / output_file)
        try:
            return [finding for each, found in group for finding in _compare_one(left, right, each, found, advance)]
        finally:
            os.close(left)
            os.close(right)

    with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="compare") as pool, until_left(advance) as advance:
        for findings in pool.map(compare, pairs.items()):
            yield from findings


def _compare_one(
    left: int, right: int, decision: Decision, found: Tensor, advance: Callable[[int], None]
) -> Iterator[Finding]:
    position = found.offset + len(decision.head)
    if decision.head and os.pread(right, len(decision.head), found.offset) != decision.head:
        yield error("bytes", f"{found.name} does not state the number of rows that stayed")
    for offset, length in coalesced(extents(decision)):
        done = 0
        while done < length:
            size = min(length - done, BUFFER_BYTES)
            if os.pread(left, size, offset + done) != os.pread(right, size, position + done):
                yield error("bytes", f"{found.name} differs from {decision.tensor.name} of the source")
                return
            done += size
            advance(size)
        position += length
