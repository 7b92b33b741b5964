"""The order in which a layer's experts are kept: any allowed count is a prefix of it.

Because every count is a prefix of one order, a larger count contains a smaller one, and equal scores fall to the
smaller index on every machine.

Axes: L layers, E experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def keep_order(score_LE: Floats, precedence_LE: Ints, num_groups: int) -> Ints:
    """The experts of each layer, first to be kept first.

    Experts are sorted by descending precedence, then by descending score (NaN last), then by ascending index. With
    groups, the r-th best of each group stands in the r-th block of `num_groups`, so that a prefix of whole blocks
    keeps the same number of each group; groups are contiguous ranges of E / num_groups experts, as vLLM cuts them.

    Args:
        score_LE: Scores.
        precedence_LE: 1 for experts that a guard keeps, -1 for those that it drops first, 0 for the rest.
        num_groups: Groups of the router; divides E.

    Returns:
        order_LE: Expert ids.
    """
    num_layers, num_experts = score_LE.shape
    shape_LGM = (num_layers, num_groups, num_experts // num_groups)
    # Stable sorts of negated keys: the ascending index decides last without being a key, and NaN comes last.
    order_LGM = np.argsort(-score_LE.reshape(shape_LGM), axis=-1, kind="stable")
    if precedence_LE.any():
        first_LGM = np.take_along_axis(-precedence_LE.reshape(shape_LGM), order_LGM, axis=-1)
        order_LGM = np.take_along_axis(order_LGM, np.argsort(first_LGM, axis=-1, kind="stable"), axis=-1)
    order_LGM = order_LGM + (np.arange(num_groups) * shape_LGM[2])[:, np.newaxis]
    order_LE: Ints = order_LGM.transpose(0, 2, 1).reshape(num_layers, num_experts).astype(np.int64)
    return order_LE


def keep_prefix(order_LE: Ints, count_L: Ints) -> Bools:
    """Which experts a count per layer keeps.

    Args:
        order_LE: Of `keep_order`.
        count_L: Experts that each layer keeps.

    Returns:
        kept_LE.
    """
    within_LE = np.arange(order_LE.shape[1]) < count_L[:, np.newaxis]
    kept_LE = np.zeros(order_LE.shape, np.bool_)
    np.put_along_axis(kept_LE, order_LE, within_LE, axis=1)
    return kept_LE
