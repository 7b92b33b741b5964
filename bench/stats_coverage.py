"""How right the standard errors of REAP and the predicted instability of a cut are, on real traffic of a real model.

Every request goes through the model once in plain PyTorch (transformers), prompt and recorded answer together; each
routed token gives one g|f|. These tokens are then the population, and its REAP is the truth. From it samples are drawn
with replacement, of whole requests or of single tokens, and each sample's 95 % interval (estimate +- 1.96 standard
errors) either covers the truth or does not.

Theory: tokens of one request resemble each other, so a sample of requests varies more than one of as many independent
tokens, by the design effect 1 + (m - 1) rho for m tokens of an expert per request and their correlation rho. Traffic
comes in requests, so the error to believe is the one that covers under sampling of requests: that of batches. The
error of tokens covers under sampling of tokens only.

The instability is measured by halves: the requests are divided at random, both halves are cut, and the decisions that
differ are counted; the prediction comes from the first half alone. Two experts that tie in the whole traffic change
sides in every split, where the prediction says half of the time, and those a little apart rarely do: a single cut of a
model of few layers may be off by two either way, so the ratio is taken over the cuts at every eighth.

Run: python bench/stats_coverage.py [--model DIR] [--traffic FILE...] [--resamples 200] [--batches 24]

Output: one JSON document. `coverage`: fraction of (layer, expert, resample) covered, for `requests_by_batches` (what
`stats show` prints; 0.92 to 0.98 wanted), `requests_by_tokens` and `tokens_by_tokens`; `design_effect_median`;
`instability_ratio`: predicted / measured flips per kept fraction and over all (1/1.5 to 1.5 wanted).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reap_serve.model import fingerprint, open_model
from reap_serve.records import provenance
from reap_serve.statistics.record import BATCH_FIELDS, BatchSums, ExpertSums, Header, Layer, Statistics, Window
from reap_serve.statistics.saliency import MixedSums, mix_slices, saliency, slice_terms
from reap_serve.statistics.uncertainty import expected_instability, standard_error

DEMO = Path(__file__).parents[1] / "reap_serve" / "demo" / "tiny_moe"
KEPT_FRACTIONS = tuple(eighths / 8 for eighths in range(1, 8))
Array = npt.NDArray[np.float64]


def reap_standard_error(sums: MixedSums) -> npt.NDArray[np.float64]:
    """Standard error of `reap`, axes [L, E], for slices pooled as observed and tokens taken as independent.

    The standard deviation of g|f| over the routed tokens, with n - 1 in the denominator, over the root of n; NaN
    below two tokens, where no spread can be seen. Tokens of one request are not independent: `uncertainty` has the
    standard error that counts with this.
    """
    n_LE = sums.token_count_LE
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_LE = sums.weighted_norm_sum_LE / n_LE
        variance_LE = np.maximum(sums.weighted_norm_sq_sum_LE / n_LE - mean_LE**2, 0)
        return np.where(n_LE >= 2, np.sqrt(variance_LE / (n_LE - 1)), np.nan)


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Every routed token of the traffic; axes T tokens, L layers, K experts per token.

    Attributes:
        request_T: Number of the request, ascending.
        expert_TLK: Chosen experts.
        gate_TLK: Weights that the model applies.
        norm_TLK: 2-norms of the experts' outputs.
    """

    request_T: npt.NDArray[np.int64]
    expert_TLK: npt.NDArray[np.int64]
    gate_TLK: Array
    norm_TLK: Array


def run_model(model_path: Path, traffic: Sequence[Path]) -> RoutedTokens:
    """Sends every request and its answer through the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # of tiny matrices; more threads wait for each other
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    seen: list[tuple[npt.NDArray[np.int64], Array, Array]] = []

    def observe(experts: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        x_TH, expert_TK, gate_TK = inputs
        norm_TK = torch.zeros(gate_TK.shape)
        for expert in range(experts.num_experts):
            token, k = torch.where(expert_TK == expert)
            gate, up = (x_TH[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            norm_TK[token, k] = ((experts.act_fn(gate) * up) @ experts.down_proj[expert].T).norm(dim=-1)
        seen.append((expert_TK.numpy(), gate_TK.numpy().astype(np.float64), norm_TK.numpy().astype(np.float64)))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(observe)
    requests, columns = [], []
    with torch.no_grad():
        for number, token_ids in enumerate(_render(tokenizer, traffic)):
            seen.clear()
            model(torch.tensor([token_ids]))
            requests.append(np.full(len(token_ids), number))
            columns.append([np.stack(values, axis=1) for values in zip(*seen, strict=True)])
    joined = [np.concatenate(values) for values in zip(*columns, strict=True)]
    return RoutedTokens(np.concatenate(requests), *joined)


def _render(tokenizer: object, traffic: Sequence[Path]) -> Iterable[list[int]]:
    for path in traffic:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            answer = record["response"]["body"]["choices"][0]["message"]
            yield tokenizer.apply_chat_template(  # type: ignore[attr-defined]
                [*record["body"]["messages"], answer],
                tools=record["body"].get("tools"),
                tokenize=True,
                return_dict=False,
            )


class Population:
    """Sums of every request, from which any sample of requests is quickly summed."""

    def __init__(self, tokens: RoutedTokens, header: Header) -> None:
        self._tokens = tokens
        self._header = header
        self.num_requests = int(tokens.request_T[-1]) + 1
        self.num_experts = header.model.num_experts
        every_token = np.ones(len(tokens.request_T))
        self._sums_CRLE = np.stack([self._per_request(values, every_token) for values in self._columns()])
        self._tokens_R = np.bincount(tokens.request_T)

    def of_requests(self, chosen: npt.NDArray[np.int64], num_batches: int) -> Statistics:
        """Statistics of a sample of requests, in batches of consecutive ones, as `join_batches` makes them."""
        parts = np.array_split(chosen, num_batches)
        sums_BCLE = np.stack([self._sums_CRLE[:, part].sum(axis=1) for part in parts])
        moments = [BatchSums.of_one(sums_CLE[:1], sums_CLE[4:5]) for sums_CLE in sums_BCLE]
        batches = BatchSums(*(np.sum([getattr(one, name) for one in moments], axis=0) for name in BATCH_FIELDS))
        return replace(self._of_sums(sums_BCLE.sum(axis=0), int(self._tokens_R[chosen].sum())), batches=batches)

    def of_tokens(self, chosen: npt.NDArray[np.int64]) -> Statistics:
        """Statistics of a sample of single tokens."""
        times_T = np.bincount(chosen, minlength=len(self._tokens.request_T)).astype(np.float64)
        sums_CLE = np.stack([self._per_request(values, times_T).sum(axis=0) for values in self._columns()])
        return self._of_sums(sums_CLE, len(chosen))

    def _columns(self) -> list[Array]:
        gate, norm = self._tokens.gate_TLK, self._tokens.norm_TLK
        return [np.ones_like(gate), gate, norm, norm**2, gate * norm, (gate * norm) ** 2]

    def _per_request(self, value_TLK: Array, times_T: Array) -> Array:
        num_layers = value_TLK.shape[1]
        sums_RLE = np.zeros((self.num_requests, num_layers, self.num_experts))
        for row in range(num_layers):
            place_TK = self._tokens.request_T[:, None] * self.num_experts + self._tokens.expert_TLK[:, row]
            weights_TK = value_TLK[:, row] * times_T[:, None]
            sums = np.bincount(place_TK.ravel(), weights_TK.ravel(), self.num_requests * self.num_experts)
            sums_RLE[:, row] = sums.reshape(self.num_requests, self.num_experts)
        return sums_RLE

    def _of_sums(self, sums_CLE: Array, num_tokens: int) -> Statistics:
        sums = ExpertSums.zeros(1, sums_CLE.shape[1], self.num_experts)
        targets = (
            sums.token_count_SPLE,
            sums.gate_sum_SPLE,
            sums.norm_sum_SPLE,
            sums.norm_sq_sum_SPLE,
            sums.weighted_norm_sum_SPLE,
            sums.weighted_norm_sq_sum_SPLE,
        )
        for target, values_LE in zip(targets, sums_CLE, strict=True):
            target[0, 0] = values_LE
        layer_token_count_SPL = np.zeros((1, 2, sums_CLE.shape[1]), np.int64)
        layer_token_count_SPL[0, 0] = num_tokens
        return Statistics(self._header, sums, layer_token_count_SPL)


def measure_coverage(
    population: Population, num_tokens: int, resamples: int, num_batches: int, rng: np.random.Generator
) -> dict[str, float]:
    """Fraction of intervals that cover, per kind of sample and error."""
    # Shuffled: in the order of the files a batch would hold one kind of traffic only.
    everything = population.of_requests(rng.permutation(population.num_requests), num_batches)
    truth_LE = saliency(mix_slices(everything), "reap")
    covered: dict[str, list[float]] = {}

    def note(name: str, statistics: Statistics, error_LE: Array) -> None:
        known = ~np.isnan(error_LE)
        miss_LE = np.abs(saliency(mix_slices(statistics), "reap") - truth_LE)
        covered.setdefault(name, []).append(float((miss_LE <= 1.96 * error_LE)[known].mean()))

    for _ in range(resamples):
        sample = population.of_requests(
            rng.integers(population.num_requests, size=population.num_requests), num_batches
        )
        note("requests_by_batches", sample, standard_error(slice_terms(sample)))
        note("requests_by_tokens", sample, reap_standard_error(mix_slices(sample)))
        single = population.of_tokens(rng.integers(num_tokens, size=num_tokens))
        note("tokens_by_tokens", single, standard_error(slice_terms(single)))
    effect_LE = standard_error(slice_terms(everything)) / reap_standard_error(mix_slices(everything))
    return {name: float(np.mean(values)) for name, values in covered.items()} | {
        "design_effect_median": float(np.median(effect_LE**2))
    }


def measure_instability(
    population: Population, splits: int, num_batches: int, rng: np.random.Generator
) -> dict[str, float | None]:
    """Predicted over measured flips between random halves, per kept fraction and over all; None without a flip."""
    predicted, measured = np.zeros(len(KEPT_FRACTIONS)), np.zeros(len(KEPT_FRACTIONS))
    for _ in range(splits):
        halves = np.array_split(rng.permutation(population.num_requests), 2)
        first, second = (population.of_requests(half, num_batches) for half in halves)
        values = [saliency(mix_slices(half), "reap") for half in (first, second)]
        error_LE = standard_error(slice_terms(first))
        for index, fraction in enumerate(KEPT_FRACTIONS):
            keep = round(fraction * population.num_experts)
            predicted[index] += expected_instability(values[0], error_LE, keep).mean()
            kept = [np.argsort(np.argsort(-value_LE, axis=1), axis=1) < keep for value_LE in values]
            measured[index] += (kept[0] != kept[1]).mean()
    ratios = {
        f"keep_{fraction}": float(p / m) if m else None
        for fraction, p, m in zip(KEPT_FRACTIONS, predicted, measured, strict=True)
    }
    return ratios | {
        "all": float(predicted.sum() / measured.sum()),
        "measured_flip_fraction": float(measured.mean() / splits),
    }


def main() -> None:
    """Runs the model, resamples, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "model")
    parser.add_argument("--traffic", type=Path, nargs="*", help="OpenAI Batch files with answers")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--batches", type=int, default=24)
    arguments = parser.parse_args()
    traffic = arguments.traffic or sorted((DEMO / "traffic").glob("*.jsonl"))
    tokens = run_model(arguments.model, traffic)
    made = provenance()
    window = Window(
        id="resample",
        started=made.created,
        ended=made.created,
        recorder="transformers",
        requests=int(tokens.request_T[-1]) + 1,
        prompt_tokens_total=0,
        prompt_tokens_computed=0,
        sample_fraction=1.0,
        complete=True,
    )
    header = Header(
        schema_version=1,
        model=fingerprint(open_model(str(arguments.model))),
        layers=tuple(Layer(index=i, name=str(i)) for i in range(tokens.expert_TLK.shape[1])),
        slices=("all",),
        windows=(window,),
        engine={},
        provenance=made,
    )
    population = Population(tokens, header)
    rng = np.random.default_rng(0)
    num_tokens = len(tokens.request_T)
    document = {
        "requests": population.num_requests,
        "tokens": num_tokens,
        "resamples": arguments.resamples,
        "coverage": measure_coverage(population, num_tokens, arguments.resamples, arguments.batches, rng),
        "instability_ratio": measure_instability(population, arguments.resamples, arguments.batches, rng),
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
