"""Texts that a logger shortened, or put something else in place of: no text that a model was shown or wrote.

A text is refused where it is a placeholder as a whole, ends in a mark of truncation, or holds a mark that only loggers
write. Text that talks of such marks is text: what a person quotes in a sentence, and what an agent's own tool says that
it left out, the model did see.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence

from reap_serve.records import JsonValue
from reap_serve.traffic.body import Object, PlainMessages, is_list, is_plain_message
from reap_serve.traffic.malformed import MalformedRecordError
from reap_serve.traffic.request import Request
from reap_serve.traffic.rows import is_finite

REASON = "text that a logger shortened or replaced"

_WORDS = (
    r"(?:redacted|truncated|masked|scrubbed|filtered|omitted|removed|hidden|stripped|suppressed|sanitized|anonymized"
    r"|elided|not\s(?:captured|recorded|logged|available)|too\s(?:large|long|big))"
)
# The whole text: words of that kind in brackets, or one of them in capitals, perhaps with a reason.
_WHOLE = re.compile(
    rf"""\s*(?:
        (?:[\[<({{]+|\*\*+|__+) [^\]>)}}\n]{{0,80}}? \b{_WORDS}(?:\b|(?=_)) [^\]>)}}\n]{{0,120}} (?:[\]>)}}]+|\*\*+|__+)
        | _*REDACTED_* | _*TRUNCATED_* | \*{{3,}} | (?:\.{{3}}|…)\s*{_WORDS}\.?
        | (?:(?:message|prompt|response|input|output)\s)?
          (?:content|text|message|prompt|response|input|output|data|value)s?\s{{1,2}}(?:was\s|has\sbeen\s|is\s)?{_WORDS}
          (?:\s(?:by|due|for|because|from)\b[^\n]{{0,80}})?\.?
        | redacted[-_ ]by[-_ ][\w-]+
    )\s*""",
    re.IGNORECASE | re.VERBOSE,
)
# The end of a text: a mark in brackets, or three dots and the word.
_END = re.compile(
    r"""(?:
        (?:\.{3}|…)?\s*[\[<({]\s*(?:\.{3}|…)?\s*
          (?:(?:content|text|message|value|string|payload|data|log|input|output|response)\s)?
          (?:truncated|shortened|cut\soff|clipped\sby\slogger|redacted|omitted\sfrom\s(?:log|trace|span)s?)
          (?:[\s,:;]+[^\]>)}\n]{0,100})?\s*(?:\.{3}|…)?\s*[\]>)}]
        | [\[<({]\s*(?:\.{3}|…)?\s*\+?\d[\d,._]*\s*(?:more\s|further\s|additional\s)?
          (?:characters?|chars?|bytes?|kb|tokens?)\s(?:truncated|omitted|more|redacted|skipped|left\sout|removed)\s*(?:\.{3}|…)?\s*[\]>)}]
        | [\[<({]\s*\+?\d[\d,._]*\s*(?:more|further|additional)\s(?:characters?|chars?|bytes?|kb|tokens?)\s*[\]>)}]
        | [\[<({]\s*(?:\.{3}|…|\+)\s*\+?\d[\d,._]*\s*(?:more\s|further\s)?
          (?:characters?|chars?|bytes?|kb|tokens?)\s*[\]>)}]
        | (?:\.{3}|…)\s*(?:truncated|\(truncated|<truncated|\+\d+\s(?:more\s)?(?:chars?|characters?|bytes?))\)?>?
    )\s*\Z""",
    re.IGNORECASE | re.VERBOSE,
)
# Anywhere: what no one but a logger writes.
_ANYWHERE = re.compile(
    r"""litellm_truncated|redacted-by-litellm|<truncated\sdue\sto|\[truncated\sdue\sto|\(truncated\sdue\sto
        |@@@langfuseMedia:|<fully\smasked\sdue\sto|\[Scrubbed\sdue\sto|<base64_image_data_redacted>
        |This\svalue\shas\sbeen\s(?:truncated|dropped)\s(?:from|because)
        |truncated\sdue\sto\s(?:its\s)?(?:size|length|attribute|limit|exceeding)
        |[\[<(]\s*(?:\.{3}|…)?\s*\d[\d,._]*\s*(?:characters?|chars?|bytes?)\s(?:truncated|omitted|redacted|skipped|removed)
         (?:\sby\s(?:the\s)?(?:logger|proxy|exporter|sdk))?\s*(?:\.{3}|…)?\s*[\])>]
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ENDS_OF_MARKS = ("s omitted", "s truncated", "s redacted", "s skipped", "s removed")
# A sign, and words of which one stands beside it in each text in which `_ANYWHERE` is found.
_MARKS = (
    ("", ("cated due to", "his value has been")),
    ("_", ("litellm_trunc", "data_redacted>")),
    ("-", ("-by-litellm",)),
    ("@", ("@@@langfuse",)),
    ("<", ("masked due",)),
    ("[", ("crubbed due",)),
    (">", _ENDS_OF_MARKS),
    (")", _ENDS_OF_MARKS),
    ("]", _ENDS_OF_MARKS),
)
_BRACKETS = ("]", ")", ">", "}")
# How a text ends in which `_END` is found.
_SPACES = string.whitespace + "\x85\xa0\u2003\u2028\u2029\u3000"
_ENDS = frozenset((*_BRACKETS, *_SPACES))
_ENDS_AFTER_DOTS = _ENDS | {"d", "s"}
# How a text begins that is a placeholder as a whole.
_WHOLE_SIGNS = frozenset("[<({*_.…" + _SPACES)
_WHOLE_STARTS = frozenset(("mess", "prom", "resp", "inpu", "outp", "cont", "text", "data", "valu", "reda", "trun"))
_END_CHARACTERS = 160
_WHOLE_CHARACTERS = 240
# Lengths to which loggers and collectors cut values, with the dots that some of them put there.
_LIMITS = (
    1000,
    1024,
    2000,
    2048,
    4000,
    4095,
    4096,
    8000,
    8191,
    8192,
    10_000,
    16_000,
    16_384,
    32_000,
    32_768,
    65_535,
    65_536,
)
_CUT_LENGTHS = frozenset(limit for limit in _LIMITS) | frozenset(limit + 3 for limit in _LIMITS)
_LOGS = frozenset({"otel", "langfuse", "litellm"})


def require_text_as_written(request: Request) -> None:
    """Refuses a request of which a text is not what the model was shown or wrote.

    In logs of observability tools a text is also refused that is cut inside a word at a length to which such tools cut.

    Raises:
        MalformedRecordError: A text of its prompt or its answer is a placeholder, or is shortened; or the body holds a
            number that JSON cannot.
    """
    if request.body is None:
        return
    if not _is_finite(request.body):
        raise MalformedRecordError("number beyond the range of a float")
    logged = request.origin.format in _LOGS
    texts = _texts(request.body, request.answer)
    if not hold_placeholder(texts) and not (logged and any(map(is_cut, texts))):
        return
    for text, place in texts_of(request.body, request.answer):
        if is_placeholder(text) or (logged and is_cut(text)):
            raise MalformedRecordError(REASON, place)


def hold_placeholder(texts: Sequence[str]) -> bool:
    """Whether one of the texts is a placeholder: mostly told from words of all of them and from first letters."""
    joined = "\n".join(texts)
    if _may_hold_mark(joined):
        return any(map(is_placeholder, texts))
    ends = _ENDS_AFTER_DOTS if "..." in joined or "…" in joined else _ENDS
    suspect = [
        text
        for text in texts
        if text[-1:] in ends
        or (len(text) <= _WHOLE_CHARACTERS and (text[:1] in _WHOLE_SIGNS or text[:4].lower() in _WHOLE_STARTS))
    ]
    return any(map(is_placeholder, suspect))


def is_placeholder(text: str) -> bool:
    """Whether a text was shortened or replaced, as its marks say."""
    if len(text) <= _WHOLE_CHARACTERS and _WHOLE.fullmatch(text):
        return True
    tail = text[-_END_CHARACTERS:].rstrip()
    may_end = tail.endswith(_BRACKETS) or (tail.endswith(("d", "s")) and ("..." in tail or "…" in tail))
    if may_end and _END.search(tail):
        return True
    return _may_hold_mark(text) and _ANYWHERE.search(text) is not None


def _may_hold_mark(text: str) -> bool:
    """Whether `_ANYWHERE` may be found in a text; nearly all are told from these words, far faster than by the pattern.

    A sign is looked for at the speed of memory, and the words that need it only where it stands.
    """
    for sign, words in _MARKS:
        if sign in text:
            for word in words:
                if word in text:
                    return True
    return False


def is_cut(text: str) -> bool:
    """Whether a text has a length to which loggers cut, and ends inside a word or in dots there."""
    if len(text) not in _CUT_LENGTHS:
        return False
    return text.endswith(("...", "…")) or (text[-1].isalnum() and len(text.split()) > 1 and len(text) in _LIMITS)


def _is_finite(body: Object) -> bool:
    messages = body.get("messages")
    for message in messages if is_list(messages) and not isinstance(messages, PlainMessages) else ():
        if isinstance(message, dict):
            for value in message.values():
                if not isinstance(value, str) and not is_finite(value):
                    return False
    return all(is_finite(value) for key, value in body.items() if key not in ("messages", "prompt"))


def texts_of(body: Object, answer: Object | None) -> Iterator[tuple[str, str]]:
    """The texts of a body and its answer that a person, a tool or a model wrote, each with its place."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        yield prompt, "prompt"
    messages = body.get("messages")
    for index, message in enumerate(messages if is_list(messages) else ()):
        yield from ((text, f"messages[{index}]") for text in _of_message(message))
    if answer is not None:
        yield from ((text, "answer") for text in _of_message(answer))


def _texts(body: Object, answer: Object | None) -> list[str]:
    """The same texts without their places, which few records need."""
    messages = body.get("messages")
    if not isinstance(messages, PlainMessages):
        return [text for text, _ in texts_of(body, answer)]
    texts = [str(message["content"]) for message in messages]
    if is_plain_message(answer):
        texts.append(answer["content"])
    else:
        texts.extend(_of_message(answer))
    return texts


def _of_message(message: JsonValue) -> Iterator[str]:
    if not isinstance(message, Mapping):
        return
    for key in ("content", "text", "reasoning"):
        value = message.get(key)
        if isinstance(value, str):
            yield value
        elif is_list(value):
            for part in value:
                yield from _of_part(part)
    calls = message.get("tool_calls")
    for call in calls if is_list(calls) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            yield arguments


def _of_part(part: JsonValue) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        if isinstance(text := part.get("text"), str):
            yield text
        image = part.get("image_url")
        if isinstance(image, Mapping) and isinstance(url := image.get("url"), str) and len(url) <= _WHOLE_CHARACTERS:
            yield url
