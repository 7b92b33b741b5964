"""The report: base against candidate, per slice."""

from __future__ import annotations

from typing import Literal

from reap_serve.compare.subspace import Subspace
from reap_serve.records import FileRecord, Provenance, Record
from reap_serve.traffic.latency import Latency

SCHEMA_VERSION = 1

# `replay` sends the recorded requests as they are, `vllm-bench` their prompts by `vllm bench serve`.
LoadDriver = Literal["replay", "vllm-bench"]


class Quality(Record):
    """Base against candidate on the recorded answers of one slice, teacher-forced, and on greedy answers.

    Names of teacher-forced figures follow llama.cpp's perplexity report. A share of greedy answers is None when there
    is no answer that it could be measured on.

    Attributes:
        requests: Requests that were scored.
        tokens: Tokens that were scored: those of the recorded answers and the token that ends each.
        perplexity_base: exp of the mean negative logprob over all tokens.
        perplexity_candidate: Likewise.
        perplexity_ratio: Candidate over base.
        kl_divergence_mean: Of KL(base || candidate) per token, nats; a lower bound, see `divergence.kl_divergence`.
        kl_divergence_median: Likewise.
        kl_divergence_p90: Likewise.
        kl_divergence_p99: Likewise.
        kl_divergence_p999: Likewise.
        kl_divergence_max: Likewise; it grows with the number of tokens and has no interval.
        same_top_token_fraction: Share of tokens where both models find the same token likeliest.
        mean_delta_p: Mean of the recorded token's probability, candidate - base.
        rms_delta_p: Root mean square of that difference.
        answers: Greedy answers that were generated with each model.
        same_answer_fraction: Share of greedy answers that are the same token for token.
        first_divergence_mean: Mean number of tokens before the two answers part; whole length where they do not.
        loop_fraction_base: Share of greedy answers that end in a loop, see `answers.loops`.
        loop_fraction_candidate: Likewise.
        length_limit_fraction_base: Share cut at the longest length.
        length_limit_fraction_candidate: Likewise.
        empty_fraction_base: Share without text and tool call.
        empty_fraction_candidate: Likewise.
        language_answers: Greedy answers whose language and whose recorded answer's language are known, in both models.
        language_switch_fraction_base: Share of them in another language than the recorded answer.
        language_switch_fraction_candidate: Likewise.
        json_answers: Greedy answers whose request asks for JSON.
        json_valid_fraction_base: Share of them that are JSON and meet the request's schema.
        json_valid_fraction_candidate: Likewise.
        tool_answers: Greedy answers whose request offers tools and whose recorded answer calls one.
        tool_call_valid_fraction_base: Share of them that call tools of the request with arguments of their schemas.
        tool_call_valid_fraction_candidate: Likewise.
        tool_calls_lost: How many of them are valid of the base and not of the candidate: a count, without an interval.
        intervals: Low and high end of the 95 % interval by the name of the figure, over requests: bootstrap for figures
            of tokens, Wilson's for shares of answers. A figure without an interval is left out.
        few_requests: Figures that rest on so few of the requests that their intervals may miss more often than 1 time
            in 20, see `bootstrap.rests_on_few`.
    """

    requests: int
    tokens: int
    perplexity_base: float
    perplexity_candidate: float
    perplexity_ratio: float
    kl_divergence_mean: float
    kl_divergence_median: float
    kl_divergence_p90: float
    kl_divergence_p99: float
    kl_divergence_p999: float
    kl_divergence_max: float
    same_top_token_fraction: float
    mean_delta_p: float
    rms_delta_p: float
    answers: int = 0
    same_answer_fraction: float | None = None
    first_divergence_mean: float | None = None
    loop_fraction_base: float | None = None
    loop_fraction_candidate: float | None = None
    length_limit_fraction_base: float | None = None
    length_limit_fraction_candidate: float | None = None
    empty_fraction_base: float | None = None
    empty_fraction_candidate: float | None = None
    language_answers: int = 0
    language_switch_fraction_base: float | None = None
    language_switch_fraction_candidate: float | None = None
    json_answers: int = 0
    json_valid_fraction_base: float | None = None
    json_valid_fraction_candidate: float | None = None
    tool_answers: int = 0
    tool_call_valid_fraction_base: float | None = None
    tool_call_valid_fraction_candidate: float | None = None
    tool_calls_lost: int | None = None
    intervals: dict[str, tuple[float, float]] = {}
    few_requests: tuple[str, ...] = ()


class SliceReport(Record):
    """One slice of the traffic.

    Attributes:
        quality: Candidate against base.
        noise_floor: The base against itself, measured a second time; None when that was not asked for.
    """

    quality: Quality
    noise_floor: Quality | None = None


class LatencyReport(Record):
    """Latency of one endpoint in a closed loop.

    Attributes:
        concurrency: Requests under way at once.
        requests: Requests sent.
        failed: Those without a whole answer.
        seconds: From the first start to the last answer.
        output_tokens_per_second: Over all requests.
        goodput_requests_per_second: Requests that meet every objective, over `seconds`; None without objectives.
        latency: Distributions over the requests that succeeded; None when all failed.
    """

    concurrency: int
    requests: int
    failed: int
    seconds: float
    output_tokens_per_second: float
    goodput_requests_per_second: float | None = None
    latency: Latency


class TaskReport(Record):
    """One metric of one task, as an evaluation tool measured it on both models.

    Attributes:
        tool: `lm-eval`, `evalplus` or `bfcl`.
        task: As the tool calls it.
        metric: Likewise; with lm-eval's filter behind a comma.
        items: Items that both models were asked; None where the tool does not say.
        base: The base's score, as the tool aggregates it.
        candidate: The candidate's.
        recovery_percent: 100 * candidate / base; None where a lower score is the better one or the base has none.
        recovery_interval: Low and high end of its 95 % interval; None where the results hold neither items nor errors.
        method: How the interval was made: from the items of both models in pairs (bootstrap), or from the tool's own
            standard errors of both, which leaves their correlation out and is the wider for it (Fieller).
    """

    tool: str
    task: str
    metric: str
    items: int | None
    base: float
    candidate: float
    recovery_percent: float | None
    recovery_interval: tuple[float, float] | None = None
    method: Literal["pairs", "standard errors"] | None = None


class CandidateReport(Record):
    """One of several candidates: quality against size.

    Attributes:
        name: What the user named it.
        virtual: Whether it was a plan, under which the base was run, rather than a checkpoint.
        experts_kept: Experts of the layer that keeps most; None where that is not known.
        weights_bytes: Of its tensors; of a plan, of the tensors that its checkpoint would have. None for an endpoint.
        slices: Its quality.
    """

    name: str
    virtual: bool
    experts_kept: int | None
    weights_bytes: int | None
    slices: dict[str, Quality]


class MemoryBudget(Record):
    """What both models were given the same of.

    Attributes:
        same: `memory`: weights and KV cache together; the smaller model has more KV cache. `kv_cache`: the KV cache
            alone; the smaller model takes less memory.
        size_bytes: How much.
    """

    same: Literal["memory", "kv_cache"]
    size_bytes: int


class Memory(Record):
    """Memory of one side.

    Attributes:
        weights_bytes: Of the checkpoint's tensors; None for an endpoint.
        weights_resident_bytes: What loading them took on a device, as vLLM's log says it; None on a CPU and for an
            endpoint.
        kv_cache_bytes: Of the KV cache, where a budget was given; None otherwise.
        kv_cache_tokens: Tokens that the engine's KV cache holds.
        kv_cache_max_concurrency: Sequences of the longest length that it holds at once.
        start_seconds: From the start of the server until it answered; None for an endpoint.
        resident_bytes: Host memory of the server's processes once it answered, as proportional set size; None for an
            endpoint. Device memory is not in it.
        peak_resident_bytes: The largest seen while it was measured, likewise.
    """

    weights_bytes: int | None
    weights_resident_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None
    kv_cache_max_concurrency: float | None = None
    start_seconds: float | None
    resident_bytes: int | None = None
    peak_resident_bytes: int | None = None


class ConcurrencyLevel(Record):
    """Both models with the same number of requests under way."""

    concurrency: int
    base: LatencyReport
    candidate: LatencyReport


class LatencySides(Record):
    """Latency of both models; None where it was not measured.

    Attributes:
        base: At the first concurrency.
        candidate: Likewise.
        levels: At every concurrency.
        driver: What sent the requests.
        objectives: Longest seconds of a good request by `ttft`, `tpot`, `e2el`.
    """

    base: LatencyReport | None
    candidate: LatencyReport | None
    levels: tuple[ConcurrencyLevel, ...] = ()
    driver: LoadDriver = "replay"
    objectives: dict[str, float] = {}


class MemorySides(Record):
    """Memory of both models.

    Attributes:
        base: Of the base.
        candidate: Of the candidate.
        budget: What both were given the same of; None where they were served as they are.
    """

    base: Memory
    candidate: Memory
    budget: MemoryBudget | None = None


class Report(FileRecord):
    """A comparison.

    Attributes:
        base: What the user named as base.
        candidate: What the user named as candidate.
        too_long: Requests left out because they exceed the base engine's longest sequence.
        slices: By name.
        latency: In a closed loop.
        memory: Of both.
        candidates: Every candidate with its size, the one above first, where there are several; none otherwise.
        tasks: What evaluation tools measured.
        subspace: Where the experts' outputs lie; None where no analysis was given.
    """

    provenance: Provenance
    base: str
    candidate: str
    too_long: int
    slices: dict[str, SliceReport]
    latency: LatencySides
    memory: MemorySides
    candidates: tuple[CandidateReport, ...] = ()
    tasks: tuple[TaskReport, ...] = ()
    subspace: Subspace | None = None
