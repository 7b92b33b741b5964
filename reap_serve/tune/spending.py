"""The budget of a run: what is spent, what is left, and what a measurement will cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from reap_serve.tune.engine import TuneEngine
from reap_serve.tune.request import Budget


@dataclass(slots=True)
class Spending:
    """See the module.

    Attributes:
        budget: What may be spent.
        seconds_before: Time of earlier parts of a run that is resumed.
        masked_before: Masked tokens of these.
        started: When this part began, on the monotonic clock.
        engine: Once it runs.
        exhausted: Whether something was left out for want of budget.
    """

    budget: Budget
    seconds_before: float
    masked_before: int = 0
    started: float = field(default_factory=time.monotonic)
    engine: TuneEngine | None = None
    exhausted: bool = False

    @property
    def seconds(self) -> float:
        """Time of all parts so far."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def masked_tokens(self) -> int:
        """Masked tokens of all parts so far."""
        return self.masked_before + (0 if self.engine is None else self.engine.masked_tokens)

    def seconds_for(self, tokens: int) -> float:
        """Time that so many tokens take, by what was measured."""
        assert self.engine is not None
        return tokens * self.engine.seconds / max(self.engine.tokens, 1)

    def affords(self, tokens: int, reserve: int = 0) -> bool:
        """Whether so many masked tokens can be computed, and others after them; notes it where they cannot."""
        left = True
        if self.budget.seconds is not None:
            left = self.seconds + self.seconds_for(tokens + reserve) <= self.budget.seconds
        if self.budget.masked_tokens is not None:
            left = left and self.masked_tokens + tokens + reserve <= self.budget.masked_tokens
        self.exhausted |= not left
        return left

    def describe(self, tokens: int) -> str:
        """A cost, as it is said before something is begun."""
        return f"about {tokens} masked tokens, {self.seconds_for(tokens):.0f} s"
