"""Holds the recorder's share of the engine's time to a budget by choosing the sampled fraction."""

from __future__ import annotations

SETTLE_SECONDS = 1.0
# A hundredth of the tokens costs at most about a hundredth of the experts' time, and statistics need tokens.
MINIMUM_FRACTION = 0.01
# The rest of the budget is left for what cannot be timed: frames of Python around each layer, caches found cold.
AIM = 0.75


class OverheadGovernor:
    """Chooses the fraction of tokens to sample.

    With r real tokens a busy second and c own seconds a sampled token, a fraction p costs p * r * c of the busy time;
    p = AIM * budget / (r * c) holds the budget. r and c are measured since the start, so that one flush does not swing
    them.

    Args:
        budget: Share of the engine's busy time that the recorder may take, such as 0.02.
        ceiling: Fraction that is never exceeded; the first second samples a twentieth of the tokens at most.
    """

    def __init__(self, budget: float, ceiling: float) -> None:
        self._budget = budget
        self._ceiling = ceiling
        self._busy_seconds = 0.0
        self._settled_at = SETTLE_SECONDS
        self.fraction = min(ceiling, 0.05)

    def fraction_after(
        self, *, busy_seconds: float, own_seconds: float, real_tokens: int, sampled_tokens: int
    ) -> float:
        """The fraction to use from here on.

        Args:
            busy_seconds: Duration of the step that just ended.
            own_seconds: Seconds the recorder has taken in all.
            real_tokens: Real tokens seen in all.
            sampled_tokens: Tokens sampled in all.
        """
        self._busy_seconds += busy_seconds
        if self._busy_seconds >= self._settled_at and sampled_tokens > 0 and own_seconds > 0:
            self._settled_at = self._busy_seconds + SETTLE_SECONDS
            rate, cost = real_tokens / self._busy_seconds, own_seconds / sampled_tokens
            self.fraction = min(self._ceiling, max(MINIMUM_FRACTION, AIM * self._budget / (rate * cost)))
        return self.fraction
