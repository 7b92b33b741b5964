"""Effects of single experts from trials, against a regression written out in full and against a known truth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from reap_serve.tune.trial_sums import TrialSums

Floats = npt.NDArray[np.float64]
NUM_EXPERTS, NUM_TOKENS, NUM_MASKS = 12, 9, 4


def request_of(rng: np.random.Generator, truth_P: Floats, noise: float) -> tuple[Floats, npt.NDArray[np.bool_], Floats]:
    gate_TP = np.where(rng.random((NUM_TOKENS, NUM_EXPERTS)) < 0.3, rng.random((NUM_TOKENS, NUM_EXPERTS)), 0.0)
    dropped_MP = rng.random((NUM_MASKS, NUM_EXPERTS)) < 0.5
    y_TM = np.stack([(gate_TP * row_P) @ truth_P for row_P in dropped_MP], axis=1)
    # Roots of the divergence are what the regression sees; 5 keeps them above 0.
    return gate_TP, dropped_MP, (5.0 + y_TM + noise * rng.standard_normal(y_TM.shape)) ** 2


def test_sums_equal_the_regression_written_out() -> None:
    rng = np.random.default_rng(0)
    sums = TrialSums(NUM_EXPERTS, joint=True)
    per_expert = TrialSums(NUM_EXPERTS, joint=False)
    rows, values, weights = [], [], []
    for number in range(5):
        gate_TP, dropped_MP, y_TM = request_of(rng, rng.random(NUM_EXPERTS), 0.1)
        weight = 1.0 + number
        sums.add(number, gate_TP, weight, dropped_MP, y_TM)
        per_expert.add(number, gate_TP, weight, dropped_MP, y_TM)
        x_TMP = gate_TP[:, None, :] * dropped_MP[None]
        x_TMP = x_TMP - x_TMP.mean(axis=1, keepdims=True)
        y_TM = np.sqrt(y_TM) - np.sqrt(y_TM).mean(axis=1, keepdims=True)
        rows.append(x_TMP.reshape(-1, NUM_EXPERTS))
        values.append(y_TM.reshape(-1))
        weights.append(np.full(y_TM.size, weight))
    x, y, w = np.concatenate(rows), np.concatenate(values), np.concatenate(weights)
    np.testing.assert_allclose(sums.xx_FPP.sum(axis=0), (x * w[:, None]).T @ x, atol=1e-12)
    np.testing.assert_allclose(sums.xy_FP.sum(axis=0), (x * w[:, None]).T @ y, atol=1e-12)
    np.testing.assert_allclose(sums.yy_F.sum(), (w * y**2).sum())
    np.testing.assert_allclose(per_expert.xx_FPP.sum(axis=0), ((x * w[:, None]).T @ x).diagonal(), atol=1e-12)


@pytest.mark.parametrize("joint", [True, False])
def test_effects_rank_experts_as_the_truth_does(joint: bool) -> None:
    rng = np.random.default_rng(1)
    truth_P = np.linspace(0.1, 1.2, NUM_EXPERTS)
    sums = TrialSums(NUM_EXPERTS, joint=joint)
    for number in range(400):
        sums.add(number % 5, *_with_weight(request_of(rng, truth_P, 0.2)))
    effects = sums.effects(np.ones(NUM_EXPERTS))
    effect_P = effects.score_P / sums.gate_mass_P
    assert np.corrcoef(effect_P, truth_P)[0, 1] > 0.95
    if joint:
        assert effects.explained is not None
        assert effects.explained > 0.5
        np.testing.assert_allclose(effect_P, truth_P, atol=0.1)


def test_without_a_signal_the_prior_stays() -> None:
    """Where the masks differ in nothing, any prior's order is the result's."""
    rng = np.random.default_rng(2)
    prior_P = rng.permutation(NUM_EXPERTS) + 1.0
    sums = TrialSums(NUM_EXPERTS, joint=True)
    for number in range(100):
        # What the prior says, and nothing that it does not.
        gate_TP, dropped_MP, _ = request_of(rng, prior_P, 0.0)
        mass_P = np.ones(NUM_EXPERTS)
        y_TM = np.stack([(gate_TP * row_P) @ (prior_P / mass_P) for row_P in dropped_MP], axis=1)
        sums.add(number % 5, gate_TP, 1.0, dropped_MP, (200.0 + y_TM + 30 * rng.standard_normal(y_TM.shape)) ** 2)
    score_P = sums.effects(prior_P * sums.gate_mass_P).score_P / sums.gate_mass_P
    assert np.corrcoef(score_P, prior_P)[0, 1] > 0.9


def test_sums_survive_a_file() -> None:
    rng = np.random.default_rng(3)
    sums = TrialSums(NUM_EXPERTS, joint=True)
    sums.add(0, *_with_weight(request_of(rng, rng.random(NUM_EXPERTS), 0.1)))
    again = TrialSums.from_bytes(sums.to_bytes())
    assert again.joint
    for name in ("xx_FPP", "xy_FP", "yy_F", "gate_mass_P"):
        assert np.array_equal(getattr(again, name), getattr(sums, name))


def _with_weight(
    found: tuple[Floats, npt.NDArray[np.bool_], Floats],
) -> tuple[Floats, float, npt.NDArray[np.bool_], Floats]:
    return found[0], 1.0, found[1], found[2]
