"""What a replay measures of each request, and the distribution over requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reap_serve.records import Record


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request of a replay. Times are seconds on one monotonic clock, from the start of the replay.

    Attributes:
        scheduled: When it should have started; equal to `started` in a closed loop.
        started: When it was handed to the client.
        token_times: When each piece of the answer arrived that carried text, reasoning or a tool call. A piece is
            mostly one token; servers may send several at once.
        prompt_tokens: As the server counted them; None when it did not say.
        output_tokens: As the server counted them; else the number of pieces.
        failure: Why there is no answer, such as `HTTP 400` or `APITimeoutError`; None for success.
    """

    scheduled: float
    started: float
    token_times: Sequence[float]
    prompt_tokens: int | None
    output_tokens: int
    failure: str | None

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token: arrival of the first piece - start."""
        return self.token_times[0] - self.started if self.token_times else None

    @property
    def e2e_seconds(self) -> float | None:
        """End-to-end time: arrival of the last piece - start."""
        return self.token_times[-1] - self.started if self.token_times else None

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first: (e2e - ttft) / (output_tokens - 1); None below two tokens."""
        if not self.token_times or self.output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1)

    @property
    def itl_seconds(self) -> list[float]:
        """Inter-token times: arrival of each piece - arrival of the one before."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


class Distribution(Record):
    """Mean and percentiles (linear interpolation) of a time, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Latency(Record):
    """Latency over the requests that succeeded; None where nothing was measured.

    Attributes:
        ttft: Time to first token, one value a request.
        itl: Inter-token times, all values of all requests together, as in `vllm bench serve`.
        tpot: Time per output token after the first, one value a request.
        e2e: End-to-end time, one value a request.
    """

    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None


def distribution(values: Sequence[float]) -> Distribution | None:
    """Mean and percentiles of values in seconds; None of no values."""
    import numpy as np

    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Distribution(mean=float(np.mean(values)), p50=float(p50), p90=float(p90), p99=float(p99))


def latency(outcomes: Sequence[Outcome]) -> Latency:
    """Latency over the outcomes that succeeded."""
    good = [outcome for outcome in outcomes if outcome.failure is None]
    return Latency(
        ttft=distribution([value for outcome in good if (value := outcome.ttft_seconds) is not None]),
        itl=distribution([value for outcome in good for value in outcome.itl_seconds]),
        tpot=distribution([value for outcome in good if (value := outcome.tpot_seconds) is not None]),
        e2e=distribution([value for outcome in good if (value := outcome.e2e_seconds) is not None]),
    )
