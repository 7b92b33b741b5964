"""Text in the place of text that was not recorded: of a given length, meaningless, the same for the same request."""

from __future__ import annotations

import random

from reap_serve.records import JsonValue
from reap_serve.traffic.request import Request

# Tokens that a block of a Mooncake trace stands for.
BLOCK_TOKENS = 512
# Frequent words, which with their leading blank are single tokens in the usual byte-pair vocabularies.
_WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "it", "be", "by", "are")


def filler_body(request: Request) -> dict[str, JsonValue]:
    """A completion body with the recorded lengths, for a request without text.

    The prompt has as many words as the recorded prompt had tokens; the server's tokenizer decides how many tokens
    these are. Blocks of equal id have equal text, so that a prefix cache meets the repetitions that the recorded
    server met. The answer is forced to its recorded length with vLLM's `ignore_eos`.
    """
    tokens = request.prompt_tokens or 1
    if request.block_ids:
        words = [word for block in request.block_ids for word in _words(f"block {block}", BLOCK_TOKENS)]
    else:
        words = _words(f"{request.origin}", tokens)
    words += _words(f"{request.origin} rest", max(tokens - len(words), 0))
    body: dict[str, JsonValue] = {"prompt": " ".join(words[:tokens])}
    if request.output_tokens:
        body |= {"max_tokens": request.output_tokens, "ignore_eos": True}
    return body


def _words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(_WORDS, k=count)
