"""Measures a checkpoint on the held-out traffic: losses, answers, expert use.

Run: ``python -m bench.tiny_moe.evaluate --artefacts DIR [--output FILE]``; DIR holds ``model/`` and ``traffic/``.
Computes with transformers in float32. Axes: D domains, L layers, E experts, T tokens.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from bench.tiny_moe.answers import greedy_answers, is_right
from bench.tiny_moe.conversations import DOMAINS, Conversation
from bench.tiny_moe.expert_use import divergence_bits, num_covering, num_shared, shares

SCORED_DOMAINS = ("tools", "arithmetic")


@dataclass(frozen=True, slots=True)
class DomainResult:
    """Figures of one domain's held-out traffic.

    Attributes:
        num_requests: Requests read.
        num_answer_tokens: Tokens of the recorded answers, the end of the turn included.
        loss: Mean cross entropy of an answer's token, in nats, given the request and the answer so far.
        perplexity: exp(loss).
        accuracy: Share of the answers' tokens that have the highest probability.
        num_right: Greedy answers that are right; ``None`` where an answer cannot be scored.
    """

    num_requests: int
    num_answer_tokens: int
    loss: float
    perplexity: float
    accuracy: float
    num_right: int | None


def measure_domain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]
) -> tuple[DomainResult, np.ndarray]:
    """Gives a domain's figures and ``[L, E]`` counts of the tokens (request and answer) routed to each expert."""
    losses: list[float] = []
    hits: list[bool] = []
    config = model.config
    counts_LE = np.zeros((config.num_hidden_layers, config.num_experts), dtype=np.int64)
    for conversation in conversations:
        num_prompt = len(tokenizer.encode(conversation.prompt(), add_special_tokens=False))
        ids = tokenizer.encode(conversation.text().removesuffix("\n"), add_special_tokens=False)
        with torch.no_grad():
            result = model(torch.tensor([ids]), output_router_logits=True)
        logits = result.logits[0, num_prompt - 1 : -1].float()
        targets = torch.tensor(ids[num_prompt:])
        losses += functional.cross_entropy(logits, targets, reduction="none").tolist()
        hits += (logits.argmax(-1) == targets).tolist()
        for layer, router_TE in enumerate(result.router_logits):
            chosen = router_TE.view(-1, config.num_experts).topk(config.num_experts_per_tok, dim=-1).indices
            counts_LE[layer] += np.bincount(chosen.flatten().numpy(), minlength=config.num_experts)
    num_right = None
    if conversations[0].domain in SCORED_DOMAINS:
        answers = greedy_answers(model, tokenizer, conversations)
        num_right = sum(is_right(*pair) for pair in zip(conversations, answers, strict=True))
    loss = float(np.mean(losses))
    return DomainResult(
        num_requests=len(conversations),
        num_answer_tokens=len(losses),
        loss=round(loss, 4),
        perplexity=round(math.exp(loss), 3),
        accuracy=round(float(np.mean(hits)), 4),
        num_right=num_right,
    ), counts_LE


def print_tables(results: dict[str, DomainResult], counts_DLE: np.ndarray) -> None:
    """Prints the figures as the tables of the README."""
    print("| domain | requests | answer tokens | loss | perplexity | next token right | greedy answers right |")
    print("|---|---|---|---|---|---|---|")
    for domain, result in results.items():
        right = "" if result.num_right is None else f"{result.num_right} of {result.num_requests}"
        print(
            f"| {domain} | {result.num_requests} | {result.num_answer_tokens} | {result.loss:.3f} "
            f"| {result.perplexity:.3f} | {result.accuracy:.1%} | {right} |"
        )
    num_layers, num_experts = counts_DLE.shape[1:]
    print(f"\nExperts (of {num_experts}) that take 80 % of the routed tokens, and the share of the most used one\n")
    print("| domain | " + " | ".join(f"layer {layer}" for layer in range(num_layers)) + " |")
    print("|---" * (num_layers + 1) + "|")
    covering_DL, largest_DL = num_covering(counts_DLE), shares(counts_DLE).max(-1)
    for domain, covering, largest in zip(results, covering_DL, largest_DL, strict=True):
        cells = (f"{number} ({share:.1%})" for number, share in zip(covering, largest, strict=True))
        print(f"| {domain} | " + " | ".join(cells) + " |")
    print(
        f"\nOf the {num_experts // 2} most used experts of two domains, so many are the same (mean over the layers)\n"
    )
    print("| | " + " | ".join(results) + " |")
    print("|---" * (len(results) + 1) + "|")
    for first, domain in enumerate(results):
        cells = (f"{num_shared(counts_DLE, first, second):.1f}" for second in range(len(results)))
        print(f"| {domain} | " + " | ".join(cells) + " |")
    limit = math.log2(len(results))
    print(
        f"\nJensen-Shannon divergence of the domains' expert use: {divergence_bits(counts_DLE):.3f} of {limit:.3f} bits"
    )


def main() -> None:
    """Measures and prints; writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefacts", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.artefacts / "model")
    model = Qwen3MoeForCausalLM.from_pretrained(arguments.artefacts / "model", dtype=torch.float32).eval()
    results: dict[str, DomainResult] = {}
    counts = []
    for domain in DOMAINS:
        lines = (arguments.artefacts / "traffic" / f"{domain}.heldout.jsonl").read_text(encoding="utf-8").splitlines()
        results[domain], counts_LE = measure_domain(
            model, tokenizer, [Conversation.from_batch_line(line) for line in lines]
        )
        counts.append(counts_LE)
    counts_DLE = np.stack(counts)
    print_tables(results, counts_DLE)
    if arguments.output:
        content = {
            "domains": {domain: asdict(result) for domain, result in results.items()},
            "expert_counts": dict(zip(results, counts_DLE.tolist(), strict=True)),
            "jensen_shannon_bits": round(divergence_bits(counts_DLE), 4),
        }
        arguments.output.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
