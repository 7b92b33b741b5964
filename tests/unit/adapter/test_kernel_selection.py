"""Which kernel vLLM chooses on GPUs that are not here, and what records it: vLLM's own selection is run.

`python tests/unit/adapter/test_kernel_selection.py` prints the table that stands in reap_serve/adapter/GPU.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from kernel_selection import LAYOUTS, PLATFORMS, choose, formats, import_all_experts, standing_in

from reap_serve.adapter import modular_only
from reap_serve.adapter.kernel_class import adds_rows_apart, is_monolithic
from reap_serve.record.choice import LayerCircumstances
from reap_serve.record.choice import choose as choose_recorder

PAGE = Path(__file__).parents[3] / "reap_serve/adapter/GPU.md"
# Data parallelism is refused still; its kernels are in the test, not in the table.
PRINTED = ("TP1", "TP4", "EP8")


class Observing:
    """Whether the engine whose layer is built observes."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self) -> bool:
        return self.now


OBSERVING = Observing()


@pytest.fixture(scope="module", autouse=True)
def _taught() -> Iterator[None]:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    plain = FusedMoEExperts.is_supported_config
    plain = getattr(plain, "__wrapped__", plain)
    FusedMoEExperts.is_supported_config = staticmethod(plain)
    modular_only.answer_for_monolithic(OBSERVING)
    yield
    FusedMoEExperts.is_supported_config = staticmethod(plain)


def chosen(layout: str, fmt: Any) -> tuple[str, str]:
    """Kernels of a plain and of an observing engine."""
    names = []
    for OBSERVING.now in (False, True):
        kernel = choose(fmt, layout)
        assert not (OBSERVING.now and is_monolithic(kernel)), (layout, fmt.name)
        names.append(kernel.__name__)
    OBSERVING.now = False
    return names[0], names[1]


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_observing_engine_gets_a_modular_kernel_in_every_cell(platform: str) -> None:
    with standing_in(platform):
        for layout, fmt in itertools.product(LAYOUTS, formats()):
            plain, observed = chosen(layout, fmt)
            # Where vLLM chooses a modular kernel anyway, observation changes nothing.
            assert plain == observed or "Monolithic" in plain


@pytest.mark.parametrize(
    ("platform", "fmt", "plain", "observed"),
    [
        ("SM90", "bf16", "TritonExperts", "TritonExperts"),
        ("SM90", "FP8 block", "TritonExperts", "TritonExperts"),
        ("SM90", "NVFP4", "MarlinExperts", "MarlinExperts"),
        ("SM90", "MXFP4 gpt-oss", "OAITritonMxfp4ExpertsMonolithic", "OAITritonExperts"),
        ("SM100", "FP8 block", "TrtLlmFp8ExpertsMonolithic", "TrtLlmFp8ExpertsModular"),
        ("SM100", "NVFP4", "TrtLlmNvFp4ExpertsMonolithic", "TrtLlmNvFp4ExpertsModular"),
        ("SM100", "W4A16 g32", "TrtLlmMxint4ExpertsMonolithic", "MarlinExperts"),
        ("gfx942", "bf16", "TritonExperts", "TritonExperts"),
    ],
)
def test_cells_that_were_read_in_vllms_source(platform: str, fmt: str, plain: str, observed: str) -> None:
    (found,) = [each for each in formats() if each.name == fmt]
    with standing_in(platform):
        assert chosen("TP1", found) == (plain, observed)


def test_what_was_passed_over_is_known_by_name() -> None:
    with standing_in("SM100"):
        chosen("TP1", formats()[0])
    assert "TrtLlmBf16ExpertsMonolithic" in modular_only.passed_over()


def test_a_monolithic_kernel_that_was_asked_for_is_refused_with_a_remedy_that_works() -> None:
    """`--moe-backend flashinfer_trtllm` of a format whose only kernel there is monolithic."""
    (mxint4,) = [each for each in formats() if each.name == "W4A16 g32"]
    with standing_in("SM100"):
        OBSERVING.now = True
        try:
            with pytest.raises(ValueError, match=r"cannot observe .leave --moe-backend out, or run vllm serve"):
                choose(mxint4, "TP1", "flashinfer_trtllm")
            assert choose(mxint4, "TP1").__name__ == "MarlinExperts"
        finally:
            OBSERVING.now = False
        # vllm serve.
        assert choose(mxint4, "TP1", "flashinfer_trtllm").__name__ == "TrtLlmMxint4ExpertsMonolithic"


def test_every_monolithic_class_asks_the_method_that_answers() -> None:
    """A class that overrides it without asking it would be chosen in spite of us."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts, FusedMoEExpertsMonolithic

    import_all_experts()
    asked: list[str] = []
    answering = FusedMoEExperts.is_supported_config

    def listening(cls: type, *arguments: Any) -> tuple[bool, str]:
        asked.append(cls.__name__)
        return False, "listening"

    kernels = list(_leaves(FusedMoEExpertsMonolithic))
    assert len(kernels) >= 9
    FusedMoEExperts.is_supported_config = staticmethod(listening)
    try:
        config = _layer_config()
        for kernel in kernels:
            assert kernel.is_supported_config(kernel, config, None, None, kernel.activation_format())[0] is False
    finally:
        FusedMoEExperts.is_supported_config = staticmethod(answering)
    on_cpus = {"CPUExpertsInt4", "ZentorchExpertsInt4"}
    assert {kernel.__name__ for kernel in kernels} - on_cpus <= set(asked)


def _leaves(kernel: Any) -> Iterator[Any]:
    for each in kernel.__subclasses__():
        yield each
        yield from _leaves(each)


def _layer_config() -> Any:
    found = []
    with standing_in("SM100"):
        (bf16,) = [each for each in formats() if each.name == "bf16"]
        choose(type(bf16)("bf16", lambda config: (None, found.append(config) or type), {}), "TP1")
    return found[0]


def table() -> str:
    """The table of the page."""
    lines = [
        "| GPU | experts | vLLM chooses | observed | `auto` under the budget | `auto` on every token |",
        "|---|---|---|---|---|---|",
    ]
    for platform in PLATFORMS:
        with standing_in(platform):
            for fmt in formats():
                by_choice: dict[tuple[str, str], list[str]] = {}
                for layout in PRINTED:
                    by_choice.setdefault(chosen(layout, fmt), []).append(layout)
                for (plain, observed), layouts in by_choice.items():
                    where = f"{fmt.name}" + (f" ({', '.join(layouts)})" if len(by_choice) > 1 else "")
                    kept = "the same" if plain == observed else f"`{observed}`"
                    recorders = " | ".join(f"`{_recorder(observed, every_token)}`" for every_token in (False, True))
                    lines.append(f"| {platform} | {where} | `{plain}` | {kept} | {recorders} |")
    return "\n".join(lines)


def _recorder(kernel: str, every_token: bool) -> str:
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular

    (found,) = {each for each in _leaves(FusedMoEExpertsModular) if each.__name__ == kernel}
    return choose_recorder(
        LayerCircumstances(
            rows_stay=False,
            rows_pass=adds_rows_apart(found),
            graphs=True,
            every_token=every_token,
            outputs_served=True,
            extra_sums=False,
        )
    )


def test_the_page_has_the_table() -> None:
    assert table() in PAGE.read_text(), "run this file and put what it prints into the page"


if __name__ == "__main__":
    modular_only.answer_for_monolithic(OBSERVING)
    print(table())
