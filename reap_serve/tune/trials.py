"""Randomised trials: requests replayed under masks that drop experts drawn near the edge of the current ranking.

Axes: L layers with routed experts, E experts, P experts of all layers, T tokens, K experts per token, M masks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap_serve.compare.divergence import kl_divergence
from reap_serve.compare.scores import TOP_LOGPROBS
from reap_serve.plan.ranking import keep_order, keep_prefix
from reap_serve.record.settings import MAX_PLANS
from reap_serve.serve.gate_watch import WatchedGates
from reap_serve.tune.engine import MAX_LOGPROBS, Case, Mask, TuneEngine
from reap_serve.tune.ledger import Ledger
from reap_serve.tune.record import TrialRound
from reap_serve.tune.rules import Rule, mask_of, trials_rule
from reap_serve.tune.spending import Spending
from reap_serve.tune.trial_sums import MAX_JOINT_EXPERTS, NUM_FOLDS, TrialSums

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MASKS_PER_REQUEST = 4
# Rows of a batch at most, and numbers that vLLM keeps of their likeliest tokens. 20 tokens hold little of the
# probability in prose, and what they leave out is noise to a regression on single tokens: many where there is room.
MAX_ROWS, MAX_ENTRIES = 50_000, 4_000_000
# Of each round: how far an expert's rank may be moved either way, as a share of the layer's experts.
SPREADS = (0.25, 0.2, 0.15)


@dataclass(frozen=True, slots=True)
class Round:
    """What a round left: the ranking so far, and what it cost."""

    rule: Rule
    record: TrialRound


def round_tokens(cases: Sequence[Case]) -> int:
    """Masked tokens of one round."""
    return MASKS_PER_REQUEST * sum(len(case.scored_tokens) for case in cases)


def run_trials(
    engine: TuneEngine,
    cases: Sequence[Case],
    prior: Rule,
    keep_experts: int,
    seed: int,
    ledger: Ledger,
    spending: Spending,
    *,
    reserve: int = 0,
    num_rounds: int = len(SPREADS),
    on_round: Callable[[int, TrialRound], None] = lambda number, record: None,
) -> list[Round]:
    """Runs the rounds that the budget affords.

    Args:
        engine: Runs them.
        cases: Requests with answers; none of those that choose or judge.
        prior: The ranking to begin with; scores are shrunk towards it.
        keep_experts: The size whose choice is tried.
        seed: Of the masks.
        ledger: Keeps the sums of each round.
        spending: The budget.
        reserve: Tokens of it that are left for what follows.
        num_rounds: Rounds, 3 at most.
        on_round: Called after each with its number.
    """
    num_layers, num_experts = prior.evidence.saliency_LE.shape
    joint = num_layers * num_experts <= MAX_JOINT_EXPERTS
    sums = TrialSums(num_layers * num_experts, joint=joint)
    rule, rounds = prior, list[Round]()
    for number in range(num_rounds):
        name = f"trials-{keep_experts}-{number}"
        spread = SPREADS[number] * num_experts
        stored, noted = ledger.read_bytes(f"{name}.npz"), ledger.get(name)
        if stored is not None and isinstance(noted, dict):
            sums = TrialSums.from_bytes(stored)
            masked_tokens, seconds = int(noted["masked_tokens"]), float(noted["seconds"])
        elif not spending.affords(round_tokens(cases), reserve):
            break
        else:
            tokens_before, seconds_before = engine.masked_tokens, spending.seconds
            _one_round(engine, cases, rule, keep_experts, spread, np.random.default_rng([seed, number]), sums)
            masked_tokens = engine.masked_tokens - tokens_before
            seconds = spending.seconds - seconds_before
            ledger.write_bytes(f"{name}.npz", sums.to_bytes())
            ledger.put(name, {"masked_tokens": masked_tokens, "seconds": seconds}, spending.seconds)
            ledger.put("masked_tokens", spending.masked_tokens, spending.seconds)
        effects = sums.effects(_prior_score(prior).reshape(-1))
        rule = trials_rule(prior, f"round {number + 1}", effects.score_P.reshape(num_layers, num_experts))
        record = TrialRound(
            keep_experts=keep_experts,
            spread=spread,
            masks=MASKS_PER_REQUEST * len(cases),
            masked_tokens=masked_tokens,
            seconds=round(seconds, 3),
            penalty=effects.penalty,
            explained=effects.explained,
        )
        rounds.append(Round(rule, record))
        on_round(number, record)
    return rounds


def _prior_score(prior: Rule) -> Floats:
    """The prior's shares: saliency in units that layers have in common."""
    return np.maximum(prior.evidence.share_LE, 0.0)


def draw_mask(
    score_LE: Floats, precedence_LE: Ints, num_groups: int, keep: int, spread: float, rng: np.random.Generator
) -> Mask:
    """A choice of the right size whose experts have ranks moved by up to `spread` either way, uniformly.

    An expert whose rank is more than twice `spread` above the edge is never dropped, one at the edge half of the time.
    Guards and groups hold, as in any plan.
    """
    num_layers, num_experts = score_LE.shape
    order_LE = keep_order(score_LE, precedence_LE, num_groups)
    rank_LE = np.empty_like(order_LE)
    np.put_along_axis(rank_LE, order_LE, np.broadcast_to(np.arange(num_experts), order_LE.shape), axis=1)
    moved_LE = rank_LE + rng.uniform(-spread, spread, rank_LE.shape)
    return mask_of(keep_prefix(keep_order(-moved_LE, precedence_LE, num_groups), np.full(num_layers, keep)))


def _one_round(
    engine: TuneEngine,
    cases: Sequence[Case],
    rule: Rule,
    keep_experts: int,
    spread: float,
    rng: np.random.Generator,
    sums: TrialSums,
) -> None:
    evidence = rule.evidence
    num_layers, num_experts = evidence.saliency_LE.shape
    tokens_of_slice: Counter[str] = Counter()
    for case in cases:
        tokens_of_slice[case.forced.slice] += len(case.scored_tokens) - case.first_scored
    folds = itertools.cycle(range(NUM_FOLDS))
    for batch in _batches(cases):
        masks = [
            draw_mask(
                evidence.saliency_LE,
                evidence.guards.precedence_LE,
                evidence.model.num_groups,
                keep_experts,
                spread,
                rng,
            )
            for _ in range(MASKS_PER_REQUEST * len(batch))
        ]
        by_id = {mask.id: mask for mask in masks}
        engine.load(list(by_id.values()))
        asked: list[Case] = list(batch)
        under: list[str | None] = [None] * len(batch)
        for number, case in enumerate(batch):
            for mask in masks[number * MASKS_PER_REQUEST : (number + 1) * MASKS_PER_REQUEST]:
                asked.append(case)
                under.append(mask.id)
        scores = engine.score(asked, under, watch=True, num_top=_num_top(batch))
        gates = engine.gates()
        for number, case in enumerate(batch):
            mine = range(len(batch) + number * MASKS_PER_REQUEST, len(batch) + (number + 1) * MASKS_PER_REQUEST)
            divergence_TM = np.stack([kl_divergence(scores[number], scores[index]) for index in mine], axis=1)
            dropped_MP = np.stack([~masks[index - len(batch)].kept_LE.reshape(-1) for index in mine])
            gate_TP = dense_gates(gates[number], len(divergence_TM), num_layers, num_experts)
            sums.add(next(folds), gate_TP, 1.0 / tokens_of_slice[case.forced.slice], dropped_MP, divergence_TM)


def _batches(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases whose masks the engine holds at once, and whose tokens memory does."""
    batch: list[Case] = []
    for case in cases:
        if batch and (len(batch) == MAX_PLANS // MASKS_PER_REQUEST or _rows([*batch, case]) > MAX_ROWS):
            yield batch
            batch = []
        batch.append(case)
    if batch:
        yield batch


def _rows(batch: Sequence[Case]) -> int:
    return (1 + MASKS_PER_REQUEST) * sum(len(case.scored_tokens) for case in batch)


def _num_top(batch: Sequence[Case]) -> int:
    """Likeliest tokens of which a batch sees the divergence: fewer where it is long, since vLLM keeps all of them."""
    return int(np.clip(MAX_ENTRIES // _rows(batch), TOP_LOGPROBS, MAX_LOGPROBS))


def dense_gates(watched: WatchedGates, num_tokens: int, num_layers: int, num_experts: int) -> Floats:
    """Gates of every expert, [T, P], of the rows that predict the scored tokens; 0 where it was not chosen."""
    experts_TLK = watched.experts_TLK[:num_tokens].astype(np.int64)
    gate_TLE = np.zeros((num_tokens, num_layers, num_experts))
    np.put_along_axis(gate_TLE, experts_TLK, watched.gates_TLK[:num_tokens].astype(np.float64), axis=2)
    return gate_TLE.reshape(num_tokens, -1)
