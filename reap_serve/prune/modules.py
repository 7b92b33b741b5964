"""Texts that select modules, such as lists of what is not quantised: after a cut they select what they selected before.

A name of an expert follows it to its new number, or goes with it. Of every other text it is computed which expert
modules it selects, before and after, in each way in which readers of such texts compare them. Where that differs, the
text is refused: what it means depends on numbers that the cut changes.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reap_serve.errors import ArchitectureError
from reap_serve.prune.decide import Cut, MtpChoice
from reap_serve.prune.expert_names import ExpertNames, plain_name, sign_of
from reap_serve.records import JsonValue

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
Test = Callable[[str], object]

_BETWEEN_NAMES = re.compile(r"[,;\s]+")


@dataclass(frozen=True, slots=True)
class ModuleCut:
    """What a cut does to names of modules.

    Attributes:
        experts: Finds experts in texts.
        cut: Which experts stay.
        source: What it rewrites, for messages.
    """

    experts: ExpertNames
    cut: Cut
    source: str = "the quantisation configuration"

    def renamed(self, text: str) -> str | None:
        """A name after the cut, None when its module is gone; other texts as they are."""
        plain = plain_name(text)
        if plain is not None and self.cut.mtp is MtpChoice.DROP and self.experts.names.role(plain).is_mtp:
            return None
        found = self.experts.find(text)
        if found is None or found.layer is None:
            return text
        kept = self.cut.kept_in(found.layer, found.is_mtp)
        if kept is None:
            return text
        if found.expert not in kept:
            return None
        return f"{text[: found.start]}{kept.index(found.expert)}{text[found.end :]}"

    def moves(self) -> Iterator[tuple[str, str | None]]:
        """Every name of an expert module before the cut, and its name after it, None when it is gone."""
        layers = [(layer, False) for layer in self.cut.kept]
        layers += [(layer, True) for layer in self.experts.mtp_layers if self.cut.mtp is MtpChoice.CUT]
        for layer, is_mtp in layers:
            kept = self.cut.kept_in(layer, is_mtp) or ()
            for expert in range(self.cut.limits.num_experts):
                before = self.experts.modules(layer, is_mtp, expert)
                if expert not in kept:
                    yield from ((name, None) for name in before)
                else:
                    yield from zip(before, self.experts.modules(layer, is_mtp, kept.index(expert)), strict=True)

    def a_name_of_each_kind(self) -> Iterator[str]:
        """Names of the modules of one expert, under each root."""
        yield from self.experts.modules(0, False, 0)
        if self.experts.mtp_layers:
            yield from self.experts.modules(0, True, 0)

    def clean(self, value: JsonValue, *, experts_only: bool = False) -> JsonValue:
        """A configuration in which every text selects what it selected before.

        Args:
            value: Any part of a configuration.
            experts_only: Whether only texts that speak of experts can select modules.

        Raises:
            ArchitectureError: A text would select other experts after the cut.
        """
        return _Cleaner(self, experts_only).clean(value)


class _Cleaner:
    def __init__(self, modules: ModuleCut, experts_only: bool) -> None:
        self._modules = modules
        self._experts_only = experts_only
        self._moves: list[tuple[str, str | None]] | None = None
        self._outlines: frozenset[str] | None = None

    def clean(self, value: JsonValue) -> JsonValue:
        if isinstance(value, str):
            if not (sign_of(value) or "expert" in value):
                return value
            kept = self._keep([value])
            if not kept:
                raise ArchitectureError(
                    f"{self._modules.source} names one module, '{value}', and its expert is dropped",
                    "take the entry out",
                )
            return next(iter(kept.values()))
        if isinstance(value, Mapping):
            return self._clean_map(value)
        if isinstance(value, Sequence):
            kept = self._keep(list(_texts(value)))
            return self._clean_list(value, kept)
        return value

    def _clean_map(self, value: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        for key, setting in value.items():
            self._refuse_numbered(key, setting)
        # Keys with one setting are alternatives of one another, as the entries of a list are.
        groups: dict[str, list[str]] = {}
        for key, setting in value.items():
            groups.setdefault(json.dumps(setting, sort_keys=True), []).append(key)
        kept: dict[str, str] = {}
        for keys in groups.values():
            kept.update(self._keep(keys))
        return {kept[key]: self._inside(key).clean(setting) for key, setting in value.items() if key in kept}

    def _refuse_numbered(self, key: str, setting: JsonValue) -> None:
        """Refuses what is set by numbers under a name of experts: no known tool writes that, so layers may be meant."""
        count = self._modules.cut.limits.num_experts
        if isinstance(setting, Mapping):
            numbered = bool(setting) and all(map(str.isdigit, setting))
        elif isinstance(setting, Sequence) and not isinstance(setting, str):
            numbered = len(setting) == count and not any(isinstance(each, str) for each in setting)
        else:
            numbered = False
        moved = any(len(kept) < count for kept in self._modules.cut.kept.values())
        if numbered and moved and "expert" in key and not self._experts_only:
            raise ArchitectureError(
                f"{self._modules.source} sets '{key}' by numbers, which the cut changes if they are of experts",
                "set it by the names of the modules",
            )

    def _inside(self, key: str) -> _Cleaner:
        return _Cleaner(self._modules, experts_only=False) if key in QUANTIZATION_KEYS else self

    def _clean_list(self, value: Sequence[JsonValue], kept: Mapping[str, str]) -> list[JsonValue]:
        result: list[JsonValue] = []
        for each in value:
            if isinstance(each, str):
                result.extend([kept[each]] if each in kept else [])
            elif isinstance(each, Sequence):
                inner = self._clean_list(each, kept)
                result.extend([inner] if inner or not each else [])
            else:
                result.append(self.clean(each))
        return result

    def _keep(self, texts: Sequence[str]) -> dict[str, str]:
        """Texts that together select modules, each with what it is after the cut; what selects nothing is gone."""
        kept: dict[str, str] = {}
        patterns: dict[str, str | None] = {}
        for text in dict.fromkeys(texts):
            if self._experts_only and "expert" not in text:
                kept[text] = text
                continue
            self._refuse_several(text)
            renamed = self._modules.renamed(text)
            if renamed is not None:
                kept[text] = renamed
            found = self._modules.experts.find(text)
            # A part of a name that ends with a number is a part of longer numbers, too.
            is_exact = found is not None and found.layer is not None and (found.is_whole or found.end < len(text))
            if not is_exact and (renamed != text or (_depends_on_numbers(text) and self._could_select(text))):
                patterns[text] = renamed
        for text in self._require_invariant(patterns):
            kept.pop(text, None)
        return kept

    def _refuse_several(self, text: str) -> None:
        """Refuses a text of several names, of which no tool says how they are to be parted."""
        parts = _BETWEEN_NAMES.split(text)
        if len(parts) > 1 and any(plain_name(part) == part and self._modules.renamed(part) != part for part in parts):
            raise ArchitectureError(
                f"{self._modules.source} names several experts in one text, '{text[:120]}'",
                "write the names as a list",
            )

    def _could_select(self, text: str) -> bool:
        """Whether a text can select an expert module at all; lists of other modules are long, and need no closer look.

        A name that is a part of another is a part of it with all numbers alike, too.
        """
        plain = plain_name(text)
        if plain is None:
            return True
        if self._outlines is None:
            self._outlines = frozenset(map(_outline, self._modules.a_name_of_each_kind()))
        if plain == text:
            return any(_outline(text) in outline for outline in self._outlines)
        pattern = _compiled(_outline(text.removeprefix(sign_of(text))))
        return pattern is None or any(map(pattern.match, self._outlines))

    def _require_invariant(self, texts: Mapping[str, str | None]) -> set[str]:
        """Refuses texts that would select other modules after the cut; returns those that select none any more."""
        if not texts:
            return set()
        if self._moves is None:
            self._moves = list(self._modules.moves())
        left = {new for _, new in self._moves if new is not None}
        selecting, idle = set[str](), set[str]()
        before = {text: readings(text) for text in texts}
        after = {text: [] if new is None else readings(new) for text, new in texts.items()}
        for way in range(max(map(len, before.values()))):
            wanted, found = set[str](), set[str]()
            changed = None
            for text in texts:
                was = [new for old, new in self._moves if _selects(before[text], way, old)]
                now = {name for name in left if _selects(after[text], way, name)}
                moved = {new for new in was if new is not None}
                changed = text if changed is None and moved != now else changed
                (selecting if now else idle if was else set[str]()).add(text)
                wanted |= moved
                found |= now
            if wanted != found:
                raise ArchitectureError(
                    f"{self._modules.source} names experts by the pattern '{changed}', which selects other "
                    "experts once they are renumbered",
                    "replace it by the full names of the modules",
                )
        return idle - selecting


def _outline(name: str) -> str:
    """A name with all numbers alike."""
    return re.sub(r"\d+", "0", name)


def _selects(tests: Sequence[Test], way: int, name: str) -> bool:
    return bool(tests) and bool(tests[min(way, len(tests) - 1)](name))


def readings(text: str) -> list[Test]:
    """The ways in which a text is compared with the name of a module; each says whether it selects the name."""
    sign = sign_of(text)
    pattern = _compiled(text[len(sign) :])
    if sign:
        return [] if pattern is None else [pattern.match, pattern.fullmatch]
    if plain_name(text) == text:
        return [lambda name: text in name, _beginning(text), _ending(text)]
    return [re.compile(fnmatch.translate(text)).match, *([] if pattern is None else [pattern.match, pattern.search])]


def _beginning(text: str) -> Test:
    return lambda name: f"{name}.".startswith(f"{text}.")


def _ending(text: str) -> Test:
    return lambda name: f".{name}".endswith(f".{text}")


def _compiled(body: str) -> re.Pattern[str] | None:
    try:
        return re.compile(body)
    except (re.error, RecursionError, OverflowError):
        return None


def _depends_on_numbers(text: str) -> bool:
    """Whether a text could tell one expert from another: a name without a number between dots cannot."""
    if plain_name(text) != text:
        return True
    segments = text.split(".")
    return len(segments) > 1 and any(map(str.isdigit, segments)) and not all(map(str.isdigit, segments))


def _texts(value: Iterable[JsonValue]) -> Iterator[str]:
    for each in value:
        if isinstance(each, str):
            yield each
        elif isinstance(each, Sequence):
            yield from _texts(each)
