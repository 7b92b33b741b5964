"""Whether a quantisation configuration names experts that do not exist, wherever it names modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from reap_serve.architectures.spec import RoutingLimits
from reap_serve.prune.expert_names import ExpertNames, plain_name
from reap_serve.prune.findings import Finding, error, warning
from reap_serve.prune.modules import readings
from reap_serve.records import JsonValue

# Ids beyond those of the checkpoint that a pattern is tried on: a pattern of every number selects them all.
IDS_BEYOND = 64


def inspect_modules(value: JsonValue, experts: ExpertNames, limits: RoutingLimits) -> Iterator[Finding]:
    """Looks at every key, entry and text of a configuration.

    Yields:
        Errors for names of experts that do not exist; warnings for patterns of which some numbers do not.
    """
    for place, text in dict.fromkeys(_texts(value, "quantization_config")):
        found = experts.find(text)
        if found is not None:
            known = limits.num_experts if found.layer is None else limits.experts_in(found.layer)
            if found.expert >= known:
                yield error("quantization", f"{place} names {text}, which does not exist: there are {known} experts")
        elif plain_name(text) is None:
            yield from _inspect_pattern(place, text, experts, limits)


def _inspect_pattern(place: str, text: str, experts: ExpertNames, limits: RoutingLimits) -> Iterator[Finding]:
    layers = (limits.moe_layers[0], limits.moe_layers[-1])
    first = limits.num_experts
    for selects in readings(text):
        beyond = {
            expert for expert in range(first, first + IDS_BEYOND) if _selects_any(selects, experts, layers, expert)
        }
        # A pattern of all numbers, or of none, is sound; single numbers beyond the last expert are left from before.
        if 0 < len(beyond) < IDS_BEYOND:
            some = any(_selects_any(selects, experts, layers, expert) for expert in range(first))
            # `experts.5.*` selects 50, too, and does not name it.
            written = [expert for expert in sorted(beyond) if re.search(rf"(?<![\d-]){expert}(?![\d-])", text)]
            if not some or written:
                kind = warning if some else error
                named = (written or sorted(beyond))[0]
                yield kind("quantization", f"{place}: the pattern '{text}' names expert {named} of {first}")
                return


def _selects_any(selects: Callable[[str], object], experts: ExpertNames, layers: Sequence[int], expert: int) -> bool:
    return any(selects(name) for layer in layers for name in experts.modules(layer, False, expert))


def _texts(value: JsonValue, place: str) -> Iterator[tuple[str, str]]:
    """Every key and text, with the key that it stands under."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield place, key
            yield from _texts(entry, key)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _texts(entry, place)
