"""What the candidate lost on one slice: figures with their intervals over requests.

Axes: C requests, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from reap_serve.compare.answers import Answer, Judged, common_prefix, judge
from reap_serve.compare.bootstrap import Bootstrap, Interval, rests_on_few, share_interval
from reap_serve.compare.divergence import kl_divergence
from reap_serve.compare.record import Quality
from reap_serve.compare.scores import TokenScores
from reap_serve.traffic.request import Request

Floats = npt.NDArray[np.float64]

KL_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """The greedy answers of both models to one request."""

    request: Request
    base: Answer
    candidate: Answer


@dataclass(slots=True)
class _Figures:
    """Figures, their intervals and which rest on few requests, as they are found."""

    values: dict[str, float | int | None]
    intervals: dict[str, Interval] = field(default_factory=dict)
    few_requests: list[str] = field(default_factory=list)

    def add(self, name: str, value: float, interval: Interval | None) -> None:
        self.values[name] = value
        if interval is not None:
            self.intervals[name] = interval

    def add_ratio(
        self,
        name: str,
        bootstrap: Bootstrap,
        numerator_C: Floats,
        denominator_C: Floats,
        transform: Callable[[Floats], Floats] = lambda value: value,
    ) -> None:
        """Adds f(sum of numerators / sum of denominators)."""
        value = float(transform(numerator_C.sum() / denominator_C.sum()))
        self.add(name, value, bootstrap.ratio(numerator_C, denominator_C, transform))
        if name in self.intervals and rests_on_few(numerator_C, denominator_C):
            self.few_requests.append(name)

    def add_share(self, name: str, verdicts: Sequence[bool]) -> None:
        if verdicts:
            self.add(name, sum(verdicts) / len(verdicts), share_interval(sum(verdicts), len(verdicts)))


def quality(
    base: Sequence[TokenScores], candidate: Sequence[TokenScores], answers: Sequence[AnswerPair] = ()
) -> Quality:
    """Quality over one slice.

    Args:
        base: The base's scores, one entry a request, each of one token at least.
        candidate: The candidate's scores of the same tokens.
        answers: Greedy answers of both; empty when none were generated.
    """
    figures = _Figures({"requests": len(base), "answers": len(answers)})
    _add_token_figures(figures, base, candidate)
    if answers:
        _add_answer_figures(figures, answers)
    return Quality.model_validate(
        {**figures.values, "intervals": figures.intervals, "few_requests": tuple(figures.few_requests)}
    )


def _add_token_figures(figures: _Figures, base: Sequence[TokenScores], candidate: Sequence[TokenScores]) -> None:
    bootstrap = Bootstrap(len(base))
    pairs = list(zip(base, candidate, strict=True))
    tokens_C = np.array([scores.logprob_N.shape[0] for scores in base], np.float64)

    def add_mean(
        name: str,
        values_CN: Sequence[Floats | npt.NDArray[np.bool_]],
        transform: Callable[[Floats], Floats] = lambda value: value,
    ) -> None:
        sum_C = np.array([values.sum() for values in values_CN], np.float64)
        figures.add_ratio(name, bootstrap, sum_C, tokens_C, transform)

    add_mean("perplexity_base", [-one.logprob_N for one in base], np.exp)
    add_mean("perplexity_candidate", [-other.logprob_N for other in candidate], np.exp)
    add_mean("perplexity_ratio", [one.logprob_N - other.logprob_N for one, other in pairs], np.exp)

    divergence_CN = [kl_divergence(one, other) for one, other in pairs]
    divergence_N = np.concatenate(divergence_CN)
    add_mean("kl_divergence_mean", divergence_CN)
    quantiles = np.quantile(divergence_N, list(KL_QUANTILES.values()))
    ends = bootstrap.quantiles(divergence_CN, list(KL_QUANTILES.values()))
    for position, name in enumerate(KL_QUANTILES):
        figures.add(f"kl_divergence_{name}", float(quantiles[position]), None if ends is None else ends[position])
    figures.values["kl_divergence_max"] = float(divergence_N.max())

    add_mean("same_top_token_fraction", [one.top_ids_NK[:, 0] == other.top_ids_NK[:, 0] for one, other in pairs])
    delta_CN = [np.exp(other.logprob_N) - np.exp(one.logprob_N) for one, other in pairs]
    add_mean("mean_delta_p", delta_CN)
    add_mean("rms_delta_p", [delta_N**2 for delta_N in delta_CN], np.sqrt)
    figures.values["tokens"] = int(tokens_C.sum())


def _add_answer_figures(figures: _Figures, answers: Sequence[AnswerPair]) -> None:
    judged = [(judge(pair.base, pair.request), judge(pair.candidate, pair.request)) for pair in answers]
    figures.add_share("same_answer_fraction", [pair.base.token_ids == pair.candidate.token_ids for pair in answers])
    prefix_C = np.array([common_prefix(pair.base.token_ids, pair.candidate.token_ids) for pair in answers], np.float64)
    figures.add_ratio("first_divergence_mean", Bootstrap(len(answers)), prefix_C, np.ones(len(answers)))
    for position, side in enumerate(("base", "candidate")):
        verdicts = [pair[position] for pair in judged]
        figures.add_share(f"loop_fraction_{side}", [verdict.loops for verdict in verdicts])
        figures.add_share(f"length_limit_fraction_{side}", [verdict.length_limited for verdict in verdicts])
        figures.add_share(f"empty_fraction_{side}", [verdict.empty for verdict in verdicts])
    # On the same answers for both models, so that the two shares can be compared.
    _add_paired(figures, "language", "language_switch_fraction", [_languages(pair) for pair in judged])
    _add_paired(figures, "json", "json_valid_fraction", [(one.json_valid, two.json_valid) for one, two in judged])
    _add_paired(
        figures,
        "tool",
        "tool_call_valid_fraction",
        [(one.tool_calls_valid, two.tool_calls_valid) for one, two in judged],
    )
    if figures.values["tool_answers"]:
        figures.values["tool_calls_lost"] = sum(
            one.tool_calls_valid is True and two.tool_calls_valid is False for one, two in judged
        )


def _languages(pair: tuple[Judged, Judged]) -> tuple[bool | None, bool | None]:
    return pair[0].language_switched, pair[1].language_switched


def _add_paired(figures: _Figures, kind: str, name: str, verdicts: Sequence[tuple[bool | None, bool | None]]) -> None:
    known = [(one, two) for one, two in verdicts if one is not None and two is not None]
    figures.values[f"{kind}_answers"] = len(known)
    figures.add_share(f"{name}_base", [one for one, _ in known])
    figures.add_share(f"{name}_candidate", [two for _, two in known])
