"""Names of experts inside texts that select modules, in every notation: exact, in part, behind a sign, escaped.

A text is a name when nothing in it is a pattern. It names an expert where the family's template stands in it, and the
layer of that expert where a number stands before the template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from reap_serve.architectures.names import NUMBER, Kind, TensorNames
from reap_serve.architectures.spec import Architecture

SIGNS = ("re:", "+:", "-:")
DOT = r"(?:\\\.|\[\.\]|\.)"
PLAIN = re.compile(r"[\w.\-]+")
DEFAULT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ExpertName:
    """An expert that a text names.

    Attributes:
        layer: Index of its layer; None where the text names no layer, or layers of two kinds at once.
        is_mtp: Whether it is a multi-token-prediction layer.
        expert: Its id.
        start: Where the id begins in the text.
        end: Where it ends.
        is_whole: Whether the text is the whole name of a module, and not a part of one.
    """

    layer: int | None
    is_mtp: bool
    expert: int
    start: int
    end: int
    is_whole: bool = False


def sign_of(text: str) -> str:
    """What stands before a pattern to mark it, empty where nothing does."""
    return next((sign for sign in SIGNS if text.startswith(sign)), "")


def plain_name(text: str) -> str | None:
    """The name that a text is, without signs, anchors and escaped dots; None when it is a pattern."""
    body = text.removeprefix(sign_of(text)).removeprefix("^").removesuffix("$")
    body = body.replace("\\.", ".").replace("[.]", ".")
    return body if PLAIN.fullmatch(body) else None


class ExpertNames:
    """Finds experts in texts and lists the names of all expert modules.

    Args:
        architecture: The family.
        names: Its names.
        mtp_layers: Multi-token-prediction layers of the checkpoint that have experts.
        is_foreign: Whether a name belongs to another decoder of the checkpoint.
    """

    def __init__(
        self,
        architecture: Architecture,
        names: TensorNames,
        mtp_layers: Collection[int] = (),
        is_foreign: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.names = names
        self._is_foreign = is_foreign
        self.mtp_layers = frozenset(mtp_layers)
        self._templates = tuple(_expert_templates(architecture))
        self._projections = architecture.projections or DEFAULT_PROJECTIONS
        mtp = architecture.mtp
        self._trunk_roots = tuple(template.removesuffix("{layer}") for template in architecture.layers)
        own = tuple(template.removesuffix("{layer}") for template in mtp.layers) if mtp is not None else ()
        self._mtp_roots = own or (self._trunk_roots if mtp is not None else ())
        alternatives = "|".join(
            rf"(?:(?P<layer{i}>{NUMBER}){DOT})?{_flexible(template, i)}" for i, template in enumerate(self._templates)
        )
        self._pattern = re.compile(rf"(?:^|(?<=[.:^\]]))(?:{alternatives})(?=$|[\\\[.$])") if alternatives else None

    def find(self, text: str) -> ExpertName | None:
        """The expert that a name names; None for a name of anything else, and for a pattern."""
        plain = plain_name(text)
        if plain is None or self._pattern is None or (match := self._pattern.search(text)) is None:
            return None
        index = next(i for i in range(len(self._templates)) if match[f"expert{i}"] is not None)
        layer, expert = match[f"layer{index}"], int(match[f"expert{index}"])
        start, end = match.span(f"expert{index}")
        role = self.names.role(plain)
        if role.kind is not Kind.EXPERT:
            role = self.names.role(f"{plain}.weight")
        if role.kind is Kind.EXPERT:
            return ExpertName(role.layer, role.is_mtp, expert, start, end, is_whole=True)
        if self._is_foreign(plain):
            return None
        if layer is None:
            return ExpertName(None, False, expert, start, end)
        before = plain_name(text[: match.start(f"layer{index}")] or ".") or ""
        is_trunk = any(root.endswith(before.lstrip(".")) for root in self._trunk_roots)
        is_mtp = any(root.endswith(before.lstrip(".")) for root in self._mtp_roots) and int(layer) in self.mtp_layers
        if is_trunk and is_mtp:
            return ExpertName(None, False, expert, start, end)
        return ExpertName(int(layer), is_mtp, expert, start, end)

    def modules(self, layer: int, is_mtp: bool, expert: int) -> Iterator[str]:
        """Every name that an expert's modules may have in a list: under each root, itself and its linear maps."""
        roots: Sequence[str] = self._mtp_roots if is_mtp else self._trunk_roots
        for root in roots:
            for template in self._templates:
                name = f"{root}{layer}.{template.replace('{expert}', str(expert))}"
                yield name
                yield from (f"{name}.{projection}" for projection in self._projections)


def _expert_templates(architecture: Architecture) -> Iterator[str]:
    if architecture.experts is not None:
        yield architecture.experts
        return
    # Experts are stored as one tensor, but tools that quantise them name each.
    modules = {stacked.rpartition(".")[0] for stacked in architecture.stacked}
    yield from (f"{module}.{{expert}}" for module in sorted(modules) if module.endswith("experts"))


def _flexible(template: str, index: int) -> str:
    """A template in which each module before the last may be left out and dots may be escaped."""
    before, _, after = template.partition("{expert}")
    segments = before.rstrip(".").split(".")
    optional = "".join(rf"(?:{re.escape(segment)}{DOT})?" for segment in segments[:-1])
    tail = "".join(rf"{DOT}{re.escape(segment)}" for segment in after.split(".") if segment)
    return rf"{optional}{re.escape(segments[-1])}{DOT}(?P<expert{index}>{NUMBER}){tail}"
