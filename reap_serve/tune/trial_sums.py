"""What trials of masks tell of single experts: sums over tokens and masks, and the ridge regression on them.

For a token t that predicts an answer's token, and a mask m of its request:

    y_tm = root of KL(base || masked),   x_tmj = gate that the base gave expert j at t, if m drops j, else 0

both less their mean over the masks of the request, since what all masks share says nothing of single experts. The root,
because a few tokens carry most of the variance of KL itself: with it the regression predicts twice as much. With
d_m = D_m - mean D, where D_mj = 1 if m drops j, x_tm = g_t d_m element by element, so the sums need the gates once:

    sum x x' = (sum_t w_t g_t g_t') * (sum_m d_m d_m'),   sum x y = sum_m d_m * (sum_t w_t g_t y_tm)

w weighs the tokens of each slice to the same total. The effect b of the experts solves

    (sum x x' + p I) b = sum x y + p a b0

with the prior b0 = score / gate mass, a the scale at which it predicts y best, and p the penalty of the smallest error
on folds of requests that were left out. An expert's score is b times its gate mass. The form of sums per expert takes
the diagonal of sum x x' alone, which costs [P] instead of [P, P].

Axes: P experts of all layers, T tokens, M masks, F folds.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

NUM_FOLDS = 5
# Penalties, as multiples of the mean of the diagonal of sum x x'.
PENALTIES = tuple(float(f"{10.0**power:.6g}") for power in np.arange(-2.0, 3.01, 0.5))
# The penalty of sums per expert, whose errors on other requests need the whole matrix.
PENALTY_PER_EXPERT = 1.0
# Beyond this many experts of all layers the joint form's matrices (F of them) and solutions are too large.
MAX_JOINT_EXPERTS = 2048


@dataclass(frozen=True, slots=True)
class Effects:
    """What the regression found.

    Attributes:
        score_P: Effect times gate mass: what all tokens together lose without the expert, roots of nats.
        penalty: Chosen by cross-validation; None in the form of sums per expert.
        explained: Share of y's squares that the effects predict on folds left out; None likewise.
    """

    score_P: Floats
    penalty: float | None
    explained: float | None


class TrialSums:
    """The sums of all trials so far.

    Args:
        num_experts: P.
        joint: Whether pairs of experts are summed, too.
    """

    def __init__(self, num_experts: int, *, joint: bool) -> None:
        self.joint = joint
        shape = (NUM_FOLDS, num_experts, num_experts) if joint else (NUM_FOLDS, num_experts)
        self.xx_FPP: Floats = np.zeros(shape, np.float64)
        self.xy_FP = np.zeros((NUM_FOLDS, num_experts))
        self.yy_F = np.zeros(NUM_FOLDS)
        self.gate_mass_P = np.zeros(num_experts)

    def add(self, fold: int, gate_TP: Floats, weight: float, dropped_MP: Bools, divergence_TM: Floats) -> None:
        """Adds one request.

        Args:
            fold: Of the request.
            gate_TP: Gates that the base gave; 0 for experts that were not chosen.
            weight: w, of each of its tokens.
            dropped_MP: D.
            divergence_TM: KL from the base under each mask, nats, 0 or above.
        """
        root_TM = np.sqrt(divergence_TM)
        y_TM = root_TM - root_TM.mean(axis=1, keepdims=True)
        d_MP = dropped_MP - dropped_MP.mean(axis=0)
        if self.joint:
            self.xx_FPP[fold] += weight * (gate_TP.T @ gate_TP) * (d_MP.T @ d_MP)
        else:
            self.xx_FPP[fold] += weight * (gate_TP**2).sum(axis=0) * (d_MP**2).sum(axis=0)
        self.xy_FP[fold] += weight * (d_MP.T * (gate_TP.T @ y_TM)).sum(axis=1)
        self.yy_F[fold] += weight * float((y_TM**2).sum())
        self.gate_mass_P += weight * gate_TP.sum(axis=0)

    def effects(self, prior_P: Floats) -> Effects:
        """The scores, shrunk towards a prior of any scale, 0 or above."""
        mass_P = self.gate_mass_P
        prior_effect_P = np.divide(prior_P, mass_P, out=np.zeros_like(prior_P), where=mass_P > 0)
        if not self.joint:
            xx_P, xy_P = self.xx_FPP.sum(axis=0), self.xy_FP.sum(axis=0)
            penalty = PENALTY_PER_EXPERT * max(float(xx_P.mean()), 1e-300)
            scale = _scale(float((prior_effect_P**2 * xx_P).sum()), float(prior_effect_P @ xy_P))
            effect_P = (xy_P + penalty * scale * prior_effect_P) / (xx_P + penalty)
            return Effects(effect_P * mass_P, None, None)
        folds = np.flatnonzero(self.yy_F > 0)
        errors = np.array([self._left_out_error(folds, factor, prior_effect_P) for factor in PENALTIES])
        best = int(errors.argmin())
        effect_P = _solve(self.xx_FPP.sum(axis=0), self.xy_FP.sum(axis=0), PENALTIES[best], prior_effect_P)
        total = float(self.yy_F.sum())
        return Effects(effect_P * mass_P, PENALTIES[best], 1.0 - errors[best] / total if total > 0 else None)

    def _left_out_error(self, folds: npt.NDArray[np.intp], factor: float, prior_effect_P: Floats) -> float:
        """Sum of squared errors on each fold of the effects that the others give."""
        if len(folds) < 2:
            return 0.0 if factor == 1.0 else 1.0
        xx_PP, xy_P = self.xx_FPP.sum(axis=0), self.xy_FP.sum(axis=0)
        error = 0.0
        for fold in folds:
            b_P = _solve(xx_PP - self.xx_FPP[fold], xy_P - self.xy_FP[fold], factor, prior_effect_P)
            error += float(self.yy_F[fold] - 2 * b_P @ self.xy_FP[fold] + b_P @ self.xx_FPP[fold] @ b_P)
        return error

    def to_bytes(self) -> bytes:
        """For `from_bytes`: sums over many requests, of no single one."""
        content = io.BytesIO()
        np.savez_compressed(content, xx=self.xx_FPP, xy=self.xy_FP, yy=self.yy_F, mass=self.gate_mass_P)
        return content.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> TrialSums:
        """What `to_bytes` wrote."""
        with np.load(io.BytesIO(content)) as arrays:
            sums = TrialSums(arrays["mass"].shape[0], joint=arrays["xx"].ndim == 3)
            sums.xx_FPP, sums.xy_FP, sums.yy_F, sums.gate_mass_P = (arrays[name] for name in ("xx", "xy", "yy", "mass"))
        return sums


def _solve(xx_PP: Floats, xy_P: Floats, factor: float, prior_effect_P: Floats) -> Floats:
    penalty = factor * max(float(np.trace(xx_PP)) / len(xx_PP), 1e-300)
    scale = _scale(float(prior_effect_P @ xx_PP @ prior_effect_P), float(prior_effect_P @ xy_P))
    right_P = xy_P + penalty * scale * prior_effect_P
    solved: Floats = np.linalg.solve(xx_PP + penalty * np.eye(len(xx_PP)), right_P).astype(np.float64)
    return solved


def _scale(square: float, cross: float) -> float:
    """The factor on the prior's effects with the least error; none that turns their order around."""
    return max(cross / square, 0.0) if square > 0 else 0.0
