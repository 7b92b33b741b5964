"""What recording costs, and the fraction of the tokens that it may take."""

from __future__ import annotations

from collections.abc import Callable

import torch

from reap_serve.record.clock import meter_of
from reap_serve.record.governor import OverheadGovernor

# Of steps, between two looks at what recording costs.
JUDGE_SECONDS = 1.0
# The same where ranks have to look at the same step.
JUDGE_STEPS = 128


class Pace:
    """Chooses the sampled fraction after each step.

    Args:
        budget: Share of the engine's time that recording may take, None to leave the fraction as it is.
        ceiling: Fraction that is never exceeded.
        buffer_tokens: Tokens that recorders hold back at most.
        device: Where the layers compute.
        agree: Gives every rank the first one's value; None where there is one rank. Ranks that followed their own
            clocks would sample different tokens, and wait for each other for ever.

    Attributes:
        busy: How long all steps took.
        own: What observation has taken of them: the recorders, the hooks, and what graphs do for them.
        fraction: To use now; with a budget the smallest one at first.
    """

    def __init__(
        self,
        budget: float | None,
        ceiling: float,
        buffer_tokens: int,
        device: torch.device,
        agree: Callable[[float], float] | None,
    ) -> None:
        self.busy, self.own = meter_of(device), meter_of(device)
        self._governor = None if budget is None else OverheadGovernor(budget, ceiling, buffer_tokens)
        self.fraction = ceiling if self._governor is None else self._governor.fraction
        self._agree = agree
        self._steps = 0
        self._judged_seconds = 0.0

    def step_is_over(self, sampled_tokens: int) -> None:
        """Chooses the next step's fraction.

        Args:
            sampled_tokens: Since the start.
        """
        self._steps += 1
        if self._governor is None:
            return
        busy_seconds = self.busy.seconds
        if self._agree is None:
            due = busy_seconds - self._judged_seconds >= JUDGE_SECONDS
        else:
            # Ranks run the same steps, each on a clock of its own.
            due = self._steps % JUDGE_STEPS == 0
        if due:
            self._judged_seconds = busy_seconds
            # Of a stream that has not passed a step yet nothing can be said.
            fraction = (
                self._governor.fraction_after(busy_seconds, self.own.seconds, sampled_tokens)
                if busy_seconds > 0
                else self.fraction
            )
            self.fraction = fraction if self._agree is None else self._agree(fraction)
            self._governor.fraction = self.fraction
