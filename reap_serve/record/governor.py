"""Holds the recorder's share of the engine's time to a budget by choosing the sampled fraction."""

from __future__ import annotations

LONGEST_SECONDS = 30.0
# A hundredth of the tokens costs at most about a hundredth of the experts' time, and statistics need tokens.
MINIMUM_FRACTION = 0.01
# The rest of the budget is left for what cannot be timed: memory and caches that the engine finds cold, a quarter of
# what a recorded step itself takes, and the seam's look at steps that need no hook.
AIM = 0.3
LARGEST_FACTOR = 2.0


class OverheadGovernor:
    """Chooses the fraction of tokens to sample.

    A recorder that takes own seconds of busy ones while the fraction is p costs the share own / busy. A part of it
    grows with p, another does not, so that

        p' = p * AIM * budget / share, at most twice and at least half of p,

    comes closer to the budget each time without passing it by. It begins at MINIMUM_FRACTION, so that the budget holds
    from the first second. A share is measured over the time in which a whole buffer of tokens is sampled: what
    recorders hold back costs nothing until it is measured.

    Args:
        budget: Share of the engine's busy time that the recorder may take, such as 0.02.
        ceiling: Fraction that is never exceeded.
        buffer_tokens: Tokens that recorders hold back at most.
    """

    def __init__(self, budget: float, ceiling: float, buffer_tokens: int) -> None:
        self._aim = AIM * budget
        self._ceiling = ceiling
        self._buffer_tokens = buffer_tokens
        self._busy_seconds_before = 0.0
        self._own_seconds_before = 0.0
        self._sampled_tokens_before = 0
        self.fraction = min(ceiling, MINIMUM_FRACTION)

    def fraction_after(self, busy_seconds: float, own_seconds: float, sampled_tokens: int) -> float:
        """The fraction to use from here on.

        Args:
            busy_seconds: Duration of all steps.
            own_seconds: Seconds the recorder has taken of them.
            sampled_tokens: Tokens sampled in all.
        """
        passed_seconds = busy_seconds - self._busy_seconds_before
        enough_tokens = sampled_tokens - self._sampled_tokens_before >= self._buffer_tokens
        if enough_tokens or passed_seconds >= LONGEST_SECONDS:
            share = (own_seconds - self._own_seconds_before) / passed_seconds
            factor = min(LARGEST_FACTOR, max(1 / LARGEST_FACTOR, self._aim / max(share, 1e-9)))
            self.fraction = min(self._ceiling, max(MINIMUM_FRACTION, self.fraction * factor))
            self._busy_seconds_before, self._own_seconds_before = busy_seconds, own_seconds
            self._sampled_tokens_before = sampled_tokens
        return self.fraction
