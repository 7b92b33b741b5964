"""The functional subspace of each layer: where experts' mean outputs lie, before and after pruning or merging.

arXiv 2510.13999 (section 3 and figure 1): the router moves a layer's output between its experts' outputs. Pruning
removes points of that set and leaves the others; merging replaces points by points nearer to the middle, so that the
set shrinks whatever the router does.

Axes: E experts with tokens, H hidden dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from reap_serve.errors import MismatchError, RequestError
from reap_serve.records import FileRecord, Provenance, Record, provenance, read_record
from reap_serve.statistics.record import Floats, Statistics
from reap_serve.statistics.saliency import slice_terms

SCHEMA_VERSION = 1
ORIGINAL = "original"


class ModelPoints(Record):
    """One model's experts in one layer.

    Attributes:
        name: `original`, or what the user called the model.
        points: Coordinates of each expert's mean output on the original's first two principal components.
        spread: Mean squared distance of the mean outputs from their middle, over all dimensions.
        participation: Participation ratio of their covariance: (sum of eigenvalues)^2 / sum of squared eigenvalues,
            the number of directions that they fill.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    spread: float
    participation: float


class LayerSubspace(Record):
    """One layer.

    Attributes:
        index: Of the decoder layer.
        explained: Share of the original's variance on each of the two components.
        models: The original first.
    """

    index: int
    explained: tuple[float, float]
    models: tuple[ModelPoints, ...]


class MergeBound(Record):
    """The error of merging two experts i and j into one, on the tokens routed to both or either.

    With g the gates (0 where an expert is not chosen), r = g_i / (g_i + g_j), and f the outputs.

    Attributes:
        layer: Index of the decoder layer.
        experts: i and j.
        bound: E[(g_i + g_j)^2] Var[r] |f_i - f_j|^2, means over the tokens and, for the distance, of squared distances.
        ideal: Measured mean squared error where the pair is replaced by the best fixed mixture of both outputs.
        measured: The same where it is replaced by the merged expert, that has the average of their weights.
        pruned: The same where the less salient of them is left out, and the router chooses among the others.
        method: How the pair was merged.
    """

    layer: int
    experts: tuple[int, int]
    bound: float
    ideal: float
    measured: float
    pruned: float
    method: str


class Subspace(FileRecord):
    """An analysis of some models.

    Attributes:
        layers: Ascending by index.
        bounds: Of merged pairs, where they were measured.
        provenance: What made it.
    """

    layers: tuple[LayerSubspace, ...]
    bounds: tuple[MergeBound, ...] = ()
    provenance: Provenance

    def ratio(self, name: str, figure: str) -> tuple[float, ...]:
        """A model's `spread` or `participation` over the original's, by layer."""
        found = []
        for layer in self.layers:
            by_name = {model.name: getattr(model, figure) for model in layer.models}
            found.append(by_name[name] / by_name[ORIGINAL])
        return tuple(found)


def analyse_subspace(original: Statistics, others: Mapping[str, Statistics]) -> Subspace:
    """Projects the experts of some models on the principal components of the original's.

    Args:
        original: Statistics of the original model with `output_sum`.
        others: Those of the models made from it, observed on the same traffic, by a name for each.

    Raises:
        RequestError: Statistics lack `output_sum`, or hold fewer than two experts with tokens in a layer.
        MismatchError: The models have other layers or another hidden dimension.
    """
    means = {name: _mean_outputs(name, each) for name, each in {ORIGINAL: original, **others}.items()}
    indices = [layer.index for layer in original.header.layers]
    for name, statistics in others.items():
        found = [layer.index for layer in statistics.header.layers]
        if found != indices or means[name][0].shape[1] != means[ORIGINAL][0].shape[1]:
            raise MismatchError(
                f"{name} has layers {found[0]}..{found[-1]} of width {means[name][0].shape[1]}, the original "
                f"{indices[0]}..{indices[-1]} of width {means[ORIGINAL][0].shape[1]}",
                "give statistics of models that were made from the original",
            )
    layers = tuple(
        _layer(index, {name: parts[row] for name, parts in means.items()}) for row, index in enumerate(indices)
    )
    return Subspace(schema_version=SCHEMA_VERSION, layers=layers, provenance=provenance(("numpy",)))


def read_subspace(path: Path) -> Subspace:
    """The analysis in a file.

    Raises:
        InputFileError: It is missing or none.
    """
    return read_record(path, Subspace, "subspace analysis")


def spread(points_EH: Floats) -> float:
    """Mean squared distance from the middle."""
    return float(np.square(points_EH - points_EH.mean(axis=0)).sum(axis=1).mean())


def participation(points_EH: Floats) -> float:
    """Participation ratio of the covariance; 0 where all points are one."""
    eigenvalues = np.square(np.linalg.svd(points_EH - points_EH.mean(axis=0), compute_uv=False))
    return float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()) if eigenvalues.any() else 0.0


def _mean_outputs(name: str, statistics: Statistics) -> list[Floats]:
    """Mean output [E, H] of each expert with tokens, by layer."""
    sums = statistics.sums.output_sum_SPLEH
    if sums is None:
        raise RequestError(f"the statistics of {name} lack output_sum", "observe with --extra-sum output_sum")
    count_LE = np.sum([term.sums.token_count_LE for term in slice_terms(statistics)], axis=0)
    output_LEH = sums.sum(axis=(0, 1))
    means = []
    for layer, count_E, output_EH in zip(statistics.header.layers, count_LE, output_LEH, strict=True):
        used = count_E > 0
        if used.sum() < 2:
            raise RequestError(f"{name} has {used.sum()} experts with tokens in {layer.name}", "observe more traffic")
        means.append(output_EH[used] / count_E[used, None])
    return means


def _layer(index: int, means: Mapping[str, Floats]) -> LayerSubspace:
    original_EH = means[ORIGINAL]
    middle_H = original_EH.mean(axis=0)
    _, singular, components = np.linalg.svd(original_EH - middle_H, full_matrices=False)
    share = np.square(singular) / max(np.square(singular).sum(), 1e-300)
    models = []
    for name, points_EH in means.items():
        projected = (points_EH - middle_H) @ components[:2].T
        if projected.shape[1] < 2:
            projected = np.pad(projected, ((0, 0), (0, 1)))
        models.append(
            ModelPoints(
                name=name,
                points=tuple((float(f"{first:.6g}"), float(f"{second:.6g}")) for first, second in projected.tolist()),
                spread=spread(points_EH),
                participation=participation(points_EH),
            )
        )
    explained = (float(share[0]), float(share[1]) if len(share) > 1 else 0.0)
    return LayerSubspace(index=index, explained=explained, models=tuple(models))
