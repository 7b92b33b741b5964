"""Text that is not ours, as a terminal or a log may show it.

Names of slices, files, models and tensors come from strangers. Raw, their control characters move a terminal's cursor,
forge lines of a log, or turn the direction of writing.
"""

from __future__ import annotations

import logging


def shown(text: str) -> str:
    r"""The text in one line: each character that cannot be printed is an escape, such as `\x1b`, `\n` or `\ud800`."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class _ShownText(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), None
        return True


def shown_logger(name: str) -> logging.Logger:
    """The logger of a name, whose messages are lines of such text."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _ShownText) for each in logger.filters):
        logger.addFilter(_ShownText())
    return logger
