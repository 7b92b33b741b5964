"""The trade-off over several sizes: safe sparsity differs by model, so look before choosing."""

from __future__ import annotations

from collections.abc import Sequence

from reap_serve.errors import PlanError
from reap_serve.plan.decision import Evidence, decide
from reap_serve.plan.request import Size
from reap_serve.plan.sizes import CheckpointBytes
from reap_serve.plan.summary import summarise
from reap_serve.records import Record


class SweepRow(Record):
    """One size.

    Attributes:
        keep_fraction: As asked.
        keep_experts: Experts per layer, the largest where layers differ; None when the size was refused.
        bytes_after: Bytes of the pruned checkpoint's tensors; None when the model was not given.
        retained_saliency: By slice, as in a plan's summary.
        retained_output: By slice, as in a plan's summary.
        instability: As in a plan's summary.
        refused: Why no plan of this size exists.
    """

    keep_fraction: float
    keep_experts: int | None = None
    bytes_after: int | None = None
    retained_saliency: dict[str, float] = {}
    retained_output: dict[str, float] = {}
    instability: float | None = None
    refused: str | None = None


def sweep(evidence: Evidence, fractions: Sequence[float], checkpoint: CheckpointBytes | None) -> tuple[SweepRow, ...]:
    """The predictions for each fraction, in ascending order."""
    rows = []
    for fraction in sorted(set(fractions)):
        size = Size(keep_fraction=fraction)
        try:
            summary = summarise(evidence, decide(evidence, size, checkpoint), checkpoint)
        except PlanError as refused:
            rows.append(SweepRow(keep_fraction=fraction, refused=str(refused)))
            continue
        rows.append(
            SweepRow(
                keep_fraction=fraction,
                keep_experts=summary.keep_experts,
                bytes_after=None if summary.bytes is None else summary.bytes.after,
                retained_saliency=summary.retained_saliency.slices,
                retained_output=summary.retained_output,
                instability=None if summary.instability is None else summary.instability.mean,
            )
        )
    return tuple(rows)
