"""Texts that select modules: after a cut they select what they selected before, or are refused."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_checkpoint import BOTH, KEPT, L0, L1

from reap_serve.architectures.names import TensorNames
from reap_serve.architectures.resolve import known_architectures
from reap_serve.architectures.spec import RoutingLimits
from reap_serve.errors import ArchitectureError
from reap_serve.prune.decide import Cut, MtpChoice
from reap_serve.prune.expert_names import ExpertName, ExpertNames
from reap_serve.prune.modules import ModuleCut
from reap_serve.records import JsonValue


def module_cut(
    kept: Mapping[int, Sequence[int]] = KEPT, experts: int = 8, family: str = "qwen3_moe", mtp: Sequence[int] = ()
) -> ModuleCut:
    architecture = known_architectures()[family]
    limits = RoutingLimits(experts, 2, 1, 1, tuple(kept))
    names = TensorNames(architecture, len(kept))
    cut = Cut(limits, {layer: tuple(ids) for layer, ids in kept.items()}, MtpChoice.CUT)
    return ModuleCut(ExpertNames(architecture, names, mtp), cut)


# A configuration, and what it is after experts 0 2 5 7 of layer 0 and 1 2 3 6 of layer 1 stay: 5 is 2, 3 is gone.
RENAMED: dict[str, tuple[JsonValue, JsonValue]] = {
    "exclude": ({"exclude": ["lm_head", *BOTH]}, {"exclude": ["lm_head", f"{L0}.2.up_proj"]}),
    "map": (
        {"layer_quant_config": {name: {"bits": bits} for bits, name in enumerate(BOTH)}},
        {"layer_quant_config": {f"{L0}.2.up_proj": {"bits": 1}}},
    ),
    "deep map": (
        {"a": {"b": [{"module_fqn_to_config": dict.fromkeys(BOTH)}]}},
        {"a": {"b": [{"module_fqn_to_config": {f"{L0}.2.up_proj": None}}]}},
    ),
    "part": (
        {"modules_to_not_convert": ["layers.0.mlp.experts.3.up_proj", "layers.0.mlp.experts.5.up_proj"]},
        {"modules_to_not_convert": ["layers.0.mlp.experts.2.up_proj"]},
    ),
    "part from the number": ({"ignore": ["0.mlp.experts.5.up_proj"]}, {"ignore": ["0.mlp.experts.2.up_proj"]}),
    "signs": (
        {"dynamic": {f"-:{L1}.3.up_proj": {}, f"+:{L1}.0.up_proj": {"bits": 8}}},
        {"dynamic": {f"-:{L1}.2.up_proj": {}}},
    ),
    "escaped": (
        {"ignore": [r"re:^model\.layers\.0\.mlp\.experts\.5\.up_proj$"]},
        {"ignore": [r"re:^model\.layers\.0\.mlp\.experts\.2\.up_proj$"]},
    ),
    "the expert itself": ({"ignore": [f"{L1}.6", f"{L1}.7"]}, {"ignore": [f"{L1}.3"]}),
    "another root": (
        {"ignore": ["language_model.model.layers.0.mlp.experts.7.down_proj"]},
        {"ignore": ["language_model.model.layers.0.mlp.experts.3.down_proj"]},
    ),
    "a root that nobody knows": (
        {"ignore": ["transformer.layers.0.mlp.experts.7.down_proj", "transformer.layers.0.mlp.experts.6.down_proj"]},
        {"ignore": ["transformer.layers.0.mlp.experts.3.down_proj"]},
    ),
    "one text": ({"target": f"{L0}.5.up_proj"}, {"target": f"{L0}.2.up_proj"}),
    "every expert by a part of its name": (
        {"modules_in_block_to_quantize": [["self_attn.q_proj"], [f"mlp.experts.{e}.up_proj" for e in range(8)]]},
        {"modules_in_block_to_quantize": [["self_attn.q_proj"], [f"mlp.experts.{e}.up_proj" for e in range(4)]]},
    ),
}


@pytest.mark.parametrize("case", RENAMED)
def test_names_follow_their_experts(case: str) -> None:
    given_value, expected = RENAMED[case]
    assert module_cut().clean(given_value) == expected


UNCHANGED: dict[str, JsonValue] = {
    "all experts of a layer": [r"re:.*layers\.1\.mlp\.experts\.\d+\.up_proj", "model.layers.1*", "model.layers.1"],
    "a class of every number": [r"re:.*\.experts\.[0-9]+\..*", "*.mlp.experts.*.up_proj", r"re:.*\.[0-7]\.up_proj"],
    "other modules": [
        "lm_head",
        "re:.*mlp.gate$",
        "model.layers.*.self_attn*",
        "Linear",
        "model.layers.0.self_attn.q_proj",
    ],
    "shared experts": ["model.layers.0.mlp.shared_experts.3.up_proj", "*.shared_expert.*"],
    "settings": [
        {"bits": 4, "group_size": 128, "version": "1.0", "0": {"x": "3"}, "desc": None, "sym": True},
        "e4m3",
        "3",
    ],
    "numbers of versions": ["1.5", "2.0.1"],
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_means_the_same_stays(case: str) -> None:
    value = {"ignore": UNCHANGED[case]}
    assert module_cut().clean(value) == value


REFUSED = {
    "glob": ["*.experts.3.*"],
    "bracketed dot": ["re:.*experts[.]3[.].*"],
    "number alone": [r"re:.*\.3\.up_proj"],
    "part of a name with the number alone": ["3.up_proj"],
    "alternatives": [r"re:.*\.(3|5)\.up_proj"],
    "a part for all layers": ["experts.3"],
    "a part that ends with the number": ["mlp.experts.5"],
    "a class of some numbers": [r"re:.*experts\.[0-3]\.up_proj"],
    "one digit": ["*.experts.[0-4].*"],
    "some of the experts of all layers": [f"mlp.experts.{expert}.up_proj" for expert in (0, 3)],
    "behind a sign": [r"-:.*\.experts\.5\..*"],
    "dots for anything": ["re:.*experts.3.up_proj"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_patterns_that_would_select_others_are_refused_by_name(case: str) -> None:
    for value in ({"ignore": REFUSED[case]}, {"map": {text: {"bits": 8} for text in REFUSED[case]}}):
        with pytest.raises(ArchitectureError, match="by the pattern") as caught:
            module_cut().clean(value)
        assert f"'{REFUSED[case][0]}'" in str(caught.value)


@pytest.mark.parametrize("between", [",", ", ", ";", "\n"])
def test_several_names_in_one_text_are_refused(between: str) -> None:
    with pytest.raises(ArchitectureError, match=r"several experts in one text.*write the names as a list"):
        module_cut().clean({"modules_to_not_convert": between.join(BOTH)})
    others = {
        "modules_to_not_convert": f"lm_head{between}model.layers.0.mlp.gate",
        "ignore": [r"re:.*experts\.\d{1,3}\.up"],
    }
    assert module_cut().clean(others) == others


@pytest.mark.parametrize("setting", [[4, 4, 8, 4, 4, 8, 4, 4], [{"bits": 8}] * 8, {"3": 8, "5": 4}])
def test_settings_by_the_number_of_an_expert_are_refused(setting: JsonValue) -> None:
    value: JsonValue = {"config_groups": {"expert_bits": setting}}
    with pytest.raises(ArchitectureError, match="sets 'expert_bits' by numbers"):
        module_cut().clean(value)
    everything = module_cut({0: range(8), 1: range(8)})
    assert everything.clean(value) == value


@pytest.mark.parametrize(
    "value",
    [
        {"experts_bits": [4, 8]},
        {"block_shape": [1] * 8},
        {"layer_bits": {"3": 8}},
        {"experts_config": {}},
        {"experts_ignore": [f"model.layers.{layer}.self_attn" for layer in range(8)]},
    ],
)
def test_other_lists_and_numbers_are_sound(value: JsonValue) -> None:
    assert module_cut().clean(value) == value
    # Outside of the quantisation, lists with a number for each layer are usual.
    counts: JsonValue = {"experts_per_layer": [8] * 8}
    assert module_cut().clean(counts, experts_only=True) == counts


def test_the_same_pattern_is_sound_where_nothing_is_renumbered() -> None:
    everything = {0: range(8), 1: range(8)}
    for texts in REFUSED.values():
        assert module_cut(everything).clean({"ignore": texts}) == {"ignore": texts}


def test_long_lists_of_other_modules_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of other modules can select no expert: the names of all experts are not even written out."""
    parts = ("self_attn.q_proj", "mlp.gate", "mlp.shared_experts.up_proj", "mlp.shared_expert_gate", "linear_attn.x.0")
    names = [f"model.layers.{layer}.{part}" for layer in range(60) for part in parts]
    value = {
        "ignore": names,
        "dynamic": {f"-:{name}": {} for name in names},
        "other": [f"re:{name}$" for name in names],
    }
    cut = module_cut()
    monkeypatch.setattr(ModuleCut, "moves", lambda self: pytest.fail("compared"))
    assert cut.clean(value) == value


def test_a_part_that_names_two_kinds_of_layers_is_refused() -> None:
    """Layer 0 of the trunk and of the draft layers keep other experts, and `layers.0` is a part of both names."""
    cut = module_cut({0: [0, 2, 5, 7], 1: [1, 2, 3, 6]}, family="qwen3_5_moe", mtp=(0,))
    with pytest.raises(ArchitectureError, match="by the pattern"):
        cut.clean({"ignore": ["layers.0.mlp.experts.5.up_proj"]})
    cleaned = cut.clean({"ignore": ["mtp.layers.0.mlp.experts.6.up_proj", f"{L0}.5.up_proj"]})
    assert cleaned == {"ignore": ["mtp.layers.0.mlp.experts.3.up_proj", f"{L0}.2.up_proj"]}


def test_experts_are_found_in_texts() -> None:
    experts = module_cut().experts
    assert experts.find(f"{L1}.13.up_proj") == ExpertName(1, False, 13, len(L1) + 1, len(L1) + 3, is_whole=True)
    assert experts.find("-:mlp.experts.4.up_proj") == ExpertName(None, False, 4, 14, 15)
    for text in ("lm_head", "*.experts.3.*", "model.layers.0.mlp.shared_experts.3.up_proj", "model.layers.0.mlp.gate"):
        assert experts.find(text) is None


WAYS: tuple[Callable[[str, str], bool], ...] = (
    lambda text, name: text in name,
    lambda text, name: name == text or name.startswith(f"{text}."),
    lambda text, name: re.match(text.removeprefix("re:"), name) is not None,
    lambda text, name: fnmatch.fnmatchcase(name, text),
)
PARTS = st.sampled_from(
    [
        "model",
        ".",
        "layers",
        "0",
        "1",
        "3",
        "5",
        "12",
        "mlp",
        "experts",
        "up_proj",
        "*",
        r"\d",
        "+",
        "re:",
        r"\.",
        "(",
        ")",
        "|",
        "?",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=9).map("".join), st.integers(0, 2**32), st.integers(2, 13))
def test_any_text_selects_the_same_or_is_refused(text: str, seed: int, count: int) -> None:
    """A number alone selects nothing. An independent oracle: names written out, compared in each way."""
    if re.fullmatch(r"[\d.]*", text):
        return
    kept = {
        layer: sorted({(seed >> layer) * 7 % 13, *(i * (seed % 12 + 1) % 13 for i in range(count))}) for layer in (0, 1)
    }
    smallest = min(map(len, kept.values()))
    kept = {layer: ids[:smallest] for layer, ids in kept.items()}
    try:
        cleaned = module_cut(kept, 13).clean({"ignore": [text]})
    except ArchitectureError:
        return
    assert isinstance(cleaned, dict)
    after = cleaned["ignore"]
    assert isinstance(after, list)

    def name(layer: int, expert: int) -> str:
        return f"model.layers.{layer}.mlp.experts.{expert}.up_proj"

    is_regex = text.startswith("re:")
    is_plain = re.fullmatch(r"[\w.\-]*", text) is not None
    ways = WAYS[2:3] if is_regex else WAYS[:2] if is_plain else WAYS[3:]
    try:
        re.compile(text.removeprefix("re:"))
    except re.error:
        ways = () if is_regex else ways
    for way in ways:
        # A whole name is exact: no reader takes it for a part of a longer one that ends with more digits.
        if is_plain and re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.\d+", text) and way is WAYS[0]:
            continue
        was = {(layer, ids.index(e)) for layer, ids in kept.items() for e in ids if way(text, name(layer, e))}
        now = {
            (layer, i)
            for layer, ids in kept.items()
            for i in range(len(ids))
            for t in after
            if way(str(t), name(layer, i))
        }
        assert was == now, (text, after, kept)
