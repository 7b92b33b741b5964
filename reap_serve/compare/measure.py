"""What one side of a comparison says: the traffic as tokens, their scores, greedy answers, latency, memory, tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from reap_serve.compare.answers import Answer
from reap_serve.compare.latency import Replayed
from reap_serve.compare.record import LoadDriver, Memory, MemoryBudget
from reap_serve.compare.scores import TokenScores
from reap_serve.compare.side import Side
from reap_serve.compare.task_results import TaskScore
from reap_serve.compare.task_tools import TaskRun, run_tasks
from reap_serve.errors import RequestError
from reap_serve.traffic.refusal import Refusals, RefusedRecordError
from reap_serve.traffic.request import Request
from reap_serve.traffic.teacher_forcing import ForcedTokens, TeacherForcing


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """How to compare.

    Attributes:
        server_arguments: Options of `vllm serve` for models that are served for the comparison.
        api_key: Bearer token for URLs.
        max_answer_tokens: Longest greedy answer.
        answers_per_slice: Greedy answers generated in each slice; 0 for none.
        latency_requests: Requests of each latency run, spread over the slices; 0 for none.
        concurrency: Requests under way at once, one latency run each.
        driver: What sends the requests of the latency runs.
        objectives: Longest seconds of a good request by `ttft`, `tpot`, `e2el`; empty for no goodput.
        noise_floor: Whether the base is measured a second time.
        budget: What both models are given the same of; None to serve them as they are.
        tasks: What evaluation tools shall measure on both.
        imported: What they measured before, on the base and on the candidate.
        refusals: What happens to requests that the base's template or engine refuses.
    """

    server_arguments: tuple[str, ...] = ()
    api_key: str | None = None
    max_answer_tokens: int = 128
    answers_per_slice: int = 32
    latency_requests: int = 64
    concurrency: tuple[int, ...] = (4,)
    driver: LoadDriver = "replay"
    objectives: Mapping[str, float] = field(default_factory=dict)
    noise_floor: bool = True
    budget: MemoryBudget | None = None
    tasks: tuple[TaskRun, ...] = ()
    imported: tuple[tuple[TaskScore, ...], tuple[TaskScore, ...]] = ((), ())
    refusals: Refusals = field(default_factory=Refusals)

    def without_load(self) -> CompareSettings:
        """The same for a candidate of which the quality on the traffic alone is asked for."""
        return replace(self, tasks=(), noise_floor=False)


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one model said.

    Attributes:
        scores: In the order of the cases.
        answers: In the order of `Cases.generated`.
    """

    scores: list[TokenScores]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured on one side.

    Attributes:
        scores: In the order of the cases.
        answers: In the order of `Cases.generated`.
        replays: One latency run for each concurrency.
        memory: What the side takes, after all this.
        again: What the same side said when it was asked a second time; None when it was not.
        tasks: What evaluation tools say of it.
    """

    scores: list[TokenScores]
    answers: list[Answer]
    replays: tuple[Replayed, ...]
    memory: Memory
    again: Spoken | None = None
    tasks: tuple[TaskScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Cases:
    """The traffic as tokens of the base.

    Attributes:
        forced: Prompts and recorded answers.
        generated: Indices of the cases whose prompts are answered freely.
        fitting: The requests of `forced`, in its order.
        timed: Indices of the cases of each latency run.
        too_long: Requests that were left out.
    """

    forced: list[ForcedTokens]
    generated: list[int]
    fitting: list[Request]
    timed: list[int]
    too_long: int

    def without_load(self) -> Cases:
        """The same without latency runs."""
        return replace(self, timed=[])


def prepare(side: Side, requests: Sequence[Request], settings: CompareSettings) -> Cases:
    """Renders the traffic once, by the base's own endpoint.

    Raises:
        RequestError: No request fits the engine.
        TrafficError: A request is refused, and records are not to be skipped.
    """
    forcing = TeacherForcing(side.endpoint)
    longest = side.endpoint.max_model_len
    forced: list[ForcedTokens] = []
    fitting: list[Request] = []
    generated: list[int] = []
    per_slice: dict[str, int] = {}
    refused_before = settings.refusals.malformed.total
    for request in requests:
        tokens = forcing.tokens_or_refuse(request, settings.refusals)
        if tokens is None or not _takes(side, request, tokens, settings.refusals):
            continue
        # One more for the end token, one for the token that scoring has to generate.
        if longest is not None and len(tokens.token_ids) + 2 > longest:
            continue
        # Without a recorded answer the first token has nothing before it to be predicted from.
        if len(tokens.token_ids) < 2:
            continue
        seen = per_slice.get(tokens.slice, 0)
        if seen < settings.answers_per_slice:
            generated.append(len(forced))
        per_slice[tokens.slice] = seen + 1
        forced.append(tokens)
        fitting.append(request)
    refused = settings.refusals.malformed.total - refused_before
    if not forced:
        if refused == len(requests):
            raise RequestError(
                f"no request could be run: {settings.refusals.malformed}",
                "give traffic that this model's template takes",
            )
        raise RequestError(
            f"none of {len(requests)} requests fits {longest} tokens", "raise the server's --max-model-len"
        )
    stride = max(1, len(fitting) // settings.latency_requests) if settings.latency_requests else 1
    timed = list(range(0, len(fitting), stride))[: settings.latency_requests]
    return Cases(forced, generated, fitting, timed, len(requests) - len(forced) - refused)


def _takes(side: Side, request: Request, tokens: ForcedTokens, refusals: Refusals) -> bool:
    """Whether the engine takes a prompt of token ids: no template has looked at those, and any may be outside."""
    if request.body is None or not isinstance(request.body.get("prompt"), list):
        return True
    try:
        side.endpoint.require_taken(tokens.token_ids[: tokens.prompt_tokens])
    except RefusedRecordError as error:
        refusals.refuse(request, error)
        return False
    return True


def measure(
    side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None], *, again: bool = False
) -> Measured:
    """Everything that one side has to say.

    Args:
        side: Which.
        cases: The traffic.
        settings: How.
        on_done: Called after each request that was scored.
        again: Ask it a second time, for the noise floor; in the opposite order, so that batches are other ones.
    """
    spoken = _listen(side, cases, settings, on_done)
    second = _listen_backwards(side, cases, settings, on_done) if again else None
    timed = [(cases.forced[index], cases.fitting[index]) for index in cases.timed]
    replays = tuple(
        side.latency(timed, settings.driver, settings.max_answer_tokens, concurrency, settings.objectives)
        for concurrency in (settings.concurrency if timed else ())
    )
    tasks = run_tasks(settings.tasks, side.endpoint.url, side.endpoint.model, side.api_key)
    return Measured(spoken.scores, spoken.answers, replays, side.memory_now(), second, tasks)


def _listen(side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None]) -> Spoken:
    prompts = [(cases.forced[index], cases.fitting[index]) for index in cases.generated]
    return Spoken(side.scores(cases.forced, on_done), side.answers(prompts, settings.max_answer_tokens))


def _listen_backwards(side: Side, cases: Cases, settings: CompareSettings, on_done: Callable[[], None]) -> Spoken:
    last = len(cases.forced) - 1
    turned = Cases(
        cases.forced[::-1], [last - index for index in reversed(cases.generated)], cases.fitting[::-1], [], 0
    )
    spoken = _listen(side, turned, settings, on_done)
    return Spoken(spoken.scores[::-1], spoken.answers[::-1])
