"""Builds the tokenizer, the packed training sequences and the traffic files.

Run: ``python -m bench.tiny_moe.data --output DIR [--cache DIR] [--seed N]``.

Shapes: S sequences of T tokens.
"""

import argparse
import random
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from bench.tiny_moe.arithmetic import make_sum
from bench.tiny_moe.conversations import DOMAINS, Conversation
from bench.tiny_moe.passages import continuations, functions
from bench.tiny_moe.sources import fetch_debian_packages, german_pages, novels, python_files
from bench.tiny_moe.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from bench.tiny_moe.tool_calls import make_call

SEQUENCE_TOKENS = 512
NUM_GENERATED = 120_000
NUM_REQUESTS = {"calibration": 200, "heldout": 120}
MAX_TRAFFIC_BYTES = 150_000
REQUEST_TOKENS = range(60, 401)
HELDOUT_PERCENT, CALIBRATION_PERCENT = 5, 10
PROMPT_WEIGHT, ANSWER_WEIGHT = 1, 4
GENERATED_DOMAINS = ("tools", "arithmetic")


def split_of(key: str) -> str:
    """Assigns a key to ``train``, ``calibration`` or ``heldout``, independent of order and seed."""
    bucket = zlib.crc32(key.encode()) % 100
    if bucket < HELDOUT_PERCENT:
        return "heldout"
    return "calibration" if bucket < HELDOUT_PERCENT + CALIBRATION_PERCENT else "train"


@dataclass(slots=True)
class Corpus:
    """Texts and conversations by split and domain."""

    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    conversations: dict[tuple[str, str], list[Conversation]] = field(default_factory=lambda: defaultdict(list))


def read_corpus(cache: Path, seed: int) -> Corpus:
    """Reads and generates the five domains; ``texts`` holds the training split only."""
    random_state = random.Random(seed)
    tree = fetch_debian_packages(cache)
    corpus = Corpus()
    for document in python_files():
        split = split_of(document.key)
        corpus.conversations[split, "code"] += functions(document)
        if split == "train":
            corpus.texts["code"].append(document.text)
    for domain, documents in (("prose", novels(tree)), ("german", german_pages(tree))):
        for document in documents:
            split = split_of(document.key)
            corpus.conversations[split, domain] += continuations(document, domain, random_state)
            if split == "train":
                corpus.texts[domain].append(document.text)
    for _ in range(NUM_GENERATED):
        call = make_call(random_state)
        corpus.conversations[split_of(call.key), "tools"].append(Conversation.from_call(call))
        question = make_sum(random_state)
        corpus.conversations[split_of(question.key), "arithmetic"].append(Conversation.from_sum(question))
    for conversations in corpus.conversations.values():
        random_state.shuffle(conversations)
    for texts in corpus.texts.values():
        random.Random(0).shuffle(texts)
    return corpus


def tokenizer_texts(corpus: Corpus) -> Iterator[str]:
    """Gives the tokenizer's training texts: about two megabytes of each read domain, less of the generated ones."""
    for domain in DOMAINS:
        texts = corpus.texts[domain] or [each.text() for each in corpus.conversations["train", domain][:4000]]
        num_characters = 0
        for text in texts:
            num_characters += len(text)
            yield text
            if num_characters > 2_000_000:
                break


def pack_texts(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Joins texts with the end-of-text token and cuts them into sequences.

    Returns:
        ``tokens_ST`` (uint16) and ``weights_ST`` (uint8, all equal).
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer.encode(text, add_special_tokens=False)
        stream.append(tokenizer.convert_tokens_to_ids(END_OF_TEXT))
    num_sequences = len(stream) // SEQUENCE_TOKENS
    tokens_ST = np.array(stream[: num_sequences * SEQUENCE_TOKENS], dtype=np.uint16).reshape(-1, SEQUENCE_TOKENS)
    return tokens_ST, np.full(tokens_ST.shape, ANSWER_WEIGHT, dtype=np.uint8)


def pack_conversations(
    tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation]
) -> tuple[np.ndarray, np.ndarray]:
    """Fills each sequence with whole conversations; the last one of a sequence is cut at its end.

    Returns:
        ``tokens_ST`` (uint16) and ``weights_ST`` (uint8): of the generated domains, the request's tokens weigh
        ``PROMPT_WEIGHT``; every other token weighs ``ANSWER_WEIGHT``.
    """
    texts = [each.text() for each in conversations]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows: list[list[int]] = []
    row_weights: list[list[int]] = []
    tokens: list[int] = []
    weights: list[int] = []
    for conversation, ids, offsets in zip(conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        light = len(conversation.prompt()) if conversation.domain in GENERATED_DOMAINS else 0
        tokens += ids
        weights += [PROMPT_WEIGHT if start < light else ANSWER_WEIGHT for start, _ in offsets]
        if len(tokens) >= SEQUENCE_TOKENS:
            rows.append(tokens[:SEQUENCE_TOKENS])
            row_weights.append(weights[:SEQUENCE_TOKENS])
            tokens, weights = [], []
    return np.array(rows, dtype=np.uint16), np.array(row_weights, dtype=np.uint8)


def write_traffic(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, folder: Path) -> None:
    """Writes ``<domain>.<split>.jsonl``; a question stands once in a file and in no training example."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, num_requests in NUM_REQUESTS.items():
        for domain in DOMAINS:
            lines: list[str] = []
            questions = {each.question for each in corpus.conversations["train", domain]}
            num_bytes = 0
            for conversation in corpus.conversations[split, domain]:
                num_tokens = len(tokenizer.encode(conversation.text(), add_special_tokens=False))
                if conversation.question in questions or num_tokens not in REQUEST_TOKENS:
                    continue
                max_tokens = 256 if domain == "code" else 96 if domain in GENERATED_DOMAINS else 160
                line = conversation.batch_line(f"{domain}-{split}-{len(lines):03d}", max_tokens)
                num_bytes += len(line.encode()) + 1
                if len(lines) == num_requests or num_bytes > MAX_TRAFFIC_BYTES:
                    break
                lines.append(line)
                questions.add(conversation.question)
            path = folder / f"{domain}.{split}.jsonl"
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            print(f"{path.name}: {len(lines)} requests, {path.stat().st_size} bytes")


def main() -> None:
    """Builds everything that training needs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tiny-moe-cache")
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()

    corpus = read_corpus(arguments.cache, arguments.seed)
    tokenizer = train_tokenizer(tokenizer_texts(corpus))
    save_tokenizer(tokenizer, arguments.output / "tokenizer")
    write_traffic(tokenizer, corpus, arguments.output / "traffic")
    for domain in DOMAINS:
        streams = {f"{domain}_chat": pack_conversations(tokenizer, corpus.conversations["train", domain])}
        if corpus.texts[domain]:
            streams[f"{domain}_text"] = pack_texts(tokenizer, corpus.texts[domain])
        for name, (tokens_ST, weights_ST) in streams.items():
            np.savez(arguments.output / f"{name}.npz", tokens=tokens_ST, weights=weights_ST)
            print(f"{name}: {tokens_ST.size} tokens in {len(tokens_ST)} sequences")


if __name__ == "__main__":
    main()
