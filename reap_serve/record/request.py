"""What is known of one request in the engine, and of decode steps that follow each other."""

from __future__ import annotations

from dataclasses import dataclass

from reap_serve.record.step import BatchRows, Step


@dataclass(slots=True)
class RequestState:
    """A request in the engine.

    Attributes:
        slice_index: Its slice.
        decode_from: Position of the first token of the answer.
        prompt_tokens: Tokens of its prompt, a teacher-forced answer included.
        plan: Id of the plan that it is under, None for the full model.
        plan_from: Position of the first row that the plan routes.
        counted: Its tokens before this position were counted.
        in_window: Whether a token of it was counted since the last reset.
        plain_from: From this position on, a row is an answer's token that was not counted yet.
        stop_tokens: Tokens that end its answer.
        last_position: Of the tokens that enter the model, None without a limit.
    """

    slice_index: int
    decode_from: int
    prompt_tokens: int
    plan: str | None
    plan_from: int = 0
    stop_tokens: frozenset[int] = frozenset()
    last_position: int | None = None
    counted: int = 0
    in_window: bool = False
    plain_from: int = 0


@dataclass(slots=True)
class DecodeSteps:
    """Steps of one new answer token a request, each like the last one: most steps of a server.

    Attributes:
        request_ids: Their requests, in order.
        num_scheduled: Rows of each: ones.
        next_positions: Position of each request's next row.
        requests: Their states, whose counts are behind until `settle`.
        recorded: Whether their rows were counted for the window.
        step: What all of them are.
    """

    request_ids: list[str]
    num_scheduled: list[int]
    next_positions: list[int]
    requests: list[RequestState]
    recorded: bool
    step: Step

    def goes_on(self, batch: BatchRows, recorded: bool) -> bool:
        """Whether a batch is one more of them: the same requests, each a token on."""
        if (
            batch.num_computed != self.next_positions
            or batch.num_scheduled != self.num_scheduled
            or batch.request_ids != self.request_ids
            or recorded != self.recorded
        ):
            return False
        self.next_positions = [position + 1 for position in self.next_positions]
        return True

    def settle(self) -> None:
        """Writes down how far the requests have come."""
        for request, position in zip(self.requests, self.next_positions, strict=True):
            request.counted = request.plain_from = position
