"""Conversations made from documents: functions to write, passages to continue."""

import ast
import random
import re
import textwrap
from collections.abc import Iterator

from bench.tiny_moe.conversations import Conversation
from bench.tiny_moe.sources import Document

FUNCTION_CHARACTERS = range(120, 901)
PASSAGE_CHARACTERS = (420, 640)
BEGINNING_FRACTION = 0.4
CONTINUE = {"prose": "Continue the text:\n", "german": "Setze den Text fort:\n"}


def functions(document: Document) -> Iterator[Conversation]:
    """Gives each documented function of a module as "write this function" with its source, docstring removed."""
    try:
        module = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = document.text.splitlines()
    for node in ast.walk(module):
        if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)) or len(node.body) < 2:
            continue
        first_line = " ".join(docstring.strip().split("\n\n")[0].split())[:200]
        head = lines[node.lineno - 1 : node.body[0].lineno - 1]
        body = lines[node.body[0].end_lineno or node.body[0].lineno : node.end_lineno]
        while body and not body[0].strip():
            body.pop(0)
        source = textwrap.dedent("\n".join(head + body)).strip()
        if head and source.startswith("def ") and len(source) in FUNCTION_CHARACTERS:
            question = f"Write the Python function {node.name}.\n{first_line}"
            yield Conversation(domain="code", question=question, answer=source)


def continuations(document: Document, domain: str, random_state: random.Random) -> Iterator[Conversation]:
    """Cuts a text into passages at sentence ends and gives each as a beginning with its continuation."""
    sentences = re.split(r"(?<=[.!?:;])\s+(?=[A-ZÄÖÜ\"„_])", document.text)
    passage = ""
    wanted = random_state.randint(*PASSAGE_CHARACTERS)
    for sentence in sentences:
        passage = f"{passage} {sentence}".strip()
        if len(passage) < wanted:
            continue
        passage = passage[: PASSAGE_CHARACTERS[1]].rsplit(" ", 1)[0]
        beginning = passage[: int(len(passage) * BEGINNING_FRACTION)].rsplit(" ", 1)[0].rstrip()
        answer = passage[len(beginning) :].strip()
        if beginning and answer:
            yield Conversation(domain=domain, question=CONTINUE[domain] + beginning, answer=answer)
        passage, wanted = "", random_state.randint(*PASSAGE_CHARACTERS)
