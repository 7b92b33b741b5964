"""Refuses traffic that does not reach the model as its log states, before an engine is started for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reap_serve.architectures.resolve import resolve
from reap_serve.errors import TrafficError
from reap_serve.model import ModelSource
from reap_serve.records import JsonValue
from reap_serve.traffic.body import PlainMessages, is_list
from reap_serve.traffic.receipt import Receipt, ReceiptTally
from reap_serve.traffic.refusal import RefusedRecordError
from reap_serve.traffic.request import Request
from reap_serve.traffic.tokens import TokenCounter

# Arguments of an engine with which it renders otherwise than the model's own tokenizer and template do.
RENDERING_ARGUMENTS = frozenset(
    {"hf_overrides", "skip_tokenizer_init", "tokenizer", "tokenizer_mode", "tokenizer_revision", "revision"}
)


def require_stated_counts(requests: Iterable[Request], counter: TokenCounter, longest: int | None) -> int:
    """Counts requests by the tokenizer alone and refuses those that an engine's receipt would warn of.

    Left to the engine are records that the template refuses, those with images and the like, whose tokens only the
    engine knows, and those that are longer than it takes.

    Args:
        requests: The traffic.
        counter: Of the model's tokenizer.
        longest: Most tokens of a request; None where it is not known.

    Returns:
        The number of requests.

    Raises:
        TrafficError: The tokens differ from those that the log states by more than a few percent.
    """
    tally = ReceiptTally(counter.unit, estimated=counter.estimated)
    number = 0
    for request in requests:
        number += 1
        try:
            length = counter(request)
        except RefusedRecordError:
            continue
        reached = (longest is None or length.total_tokens < longest) and _is_text(request)
        tally.add(request, length.prompt_tokens, length.output_tokens, reached=reached)
    refuse_differing(tally.receipt())
    return number


def refuse_differing(receipt: Receipt) -> None:
    """Refuses traffic of which a receipt warns.

    Raises:
        TrafficError: It warns of something.
    """
    warnings = receipt.warnings()
    if warnings:
        raise TrafficError(
            f"{warnings[0]} ({len(warnings)} such)",
            "look at the records that `traffic show --tokenizer MODEL` names, or leave out --strict-traffic",
        )


def longest_request(arguments: Mapping[str, JsonValue], source: ModelSource) -> int | None:
    """The longest request that an engine takes, as far as its arguments and the model's configuration say."""
    config = resolve(source.config).text_config(source.config)
    for value in (arguments.get("max_model_len"), config.get("max_position_embeddings")):
        if type(value) is int and value > 0:
            return value
    return None


def _is_text(request: Request) -> bool:
    messages = None if request.body is None else request.body.get("messages")
    if isinstance(messages, PlainMessages) or not is_list(messages):
        return True
    parts = [
        part
        for message in messages
        if isinstance(message, Mapping) and is_list(content := message.get("content"))
        for part in content
    ]
    return all(isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") == "text") for part in parts)
