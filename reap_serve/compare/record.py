"""The report: base against candidate, per slice."""

from __future__ import annotations

from reap_serve.records import Provenance, Record
from reap_serve.traffic.latency import Latency

SCHEMA_VERSION = 1


class Quality(Record):
    """Base against candidate on the recorded answers of one slice, teacher-forced, and on greedy answers.

    Attributes:
        requests: Requests that were scored.
        tokens: Tokens that were scored: those of the recorded answers and the token that ends each.
        perplexity_base: exp of the mean negative logprob.
        perplexity_candidate: Likewise.
        perplexity_ratio: Candidate over base.
        kl_divergence_mean: Of KL(base || candidate) per token, nats; a lower bound, see `quality.kl_divergence`.
        kl_divergence_median: Likewise.
        kl_divergence_p99: Likewise.
        kl_divergence_max: Likewise.
        same_top_token_fraction: Share of tokens where both models find the same token likeliest.
        rms_delta_p: Root mean square of the difference of the recorded token's probability.
        answers: Greedy answers that were generated with each model.
        loop_fraction_base: Share of them that end in a loop; None when there are none.
        loop_fraction_candidate: Likewise.
        same_answer_fraction: Share of greedy answers that are the same token for token; None when there are none.
    """

    requests: int
    tokens: int
    perplexity_base: float
    perplexity_candidate: float
    perplexity_ratio: float
    kl_divergence_mean: float
    kl_divergence_median: float
    kl_divergence_p99: float
    kl_divergence_max: float
    same_top_token_fraction: float
    rms_delta_p: float
    answers: int
    loop_fraction_base: float | None
    loop_fraction_candidate: float | None
    same_answer_fraction: float | None


class SliceReport(Record):
    """One slice of the traffic."""

    quality: Quality


class LatencyReport(Record):
    """Latency of one endpoint in a closed loop.

    Attributes:
        requests: Requests sent.
        failed: Those without a whole answer.
        seconds: From the first start to the last answer.
        output_tokens_per_second: Over all requests.
        latency: Distributions over the requests that succeeded; None when all failed.
    """

    requests: int
    failed: int
    seconds: float
    output_tokens_per_second: float
    latency: Latency


class Memory(Record):
    """Memory of one side.

    Attributes:
        weights_bytes: Of the checkpoint's tensors; None for an endpoint.
        kv_cache_tokens: Tokens that the engine's KV cache holds.
        start_seconds: From the start of the server until it answered; None for an endpoint.
    """

    weights_bytes: int | None
    kv_cache_tokens: int | None
    start_seconds: float | None


class LatencySides(Record):
    """Latency of both models; None where it was not measured."""

    base: LatencyReport | None
    candidate: LatencyReport | None


class MemorySides(Record):
    """Memory of both models."""

    base: Memory
    candidate: Memory


class Report(Record):
    """A comparison.

    Attributes:
        base: What the user named as base.
        candidate: What the user named as candidate.
        too_long: Requests left out because they exceed the shorter of both engines' longest sequences.
        slices: By name.
        latency: In a closed loop.
        memory: Of both.
    """

    schema_version: int
    provenance: Provenance
    base: str
    candidate: str
    too_long: int
    slices: dict[str, SliceReport]
    latency: LatencySides
    memory: MemorySides
