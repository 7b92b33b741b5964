"""The installed vLLM and a patched copy are told apart; what is wrong is refused by name, and accepted when mended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from reap_serve.adapter import defects
from reap_serve.errors import EngineError

ROOT = Path(__file__).parents[3]
MENDED_BY = {
    "cpu-router-sigmoid": "0001-cpu-router-scores",
    "cpu-router-softmax-bias": "0001-cpu-router-scores",
    "cpu-rotary-heads": "0002-cpu-rope-by-head",
    "cpu-wheel-command": "0003-cpu-wheel-command",
    "laguna-correction-bias": "0005-laguna-correction-bias",
    "cpu-data-parallel-moe": "0006-cpu-data-parallel-moe",
}
# Only what a process of its own would tell: `test_cpu_command.py` has it.
SLOW = "cpu-wheel-command"
EXAMINE = f"""
import json
from reap_serve.adapter.defects import DEFECTS, is_present
print(json.dumps({{each.name: is_present(each) for each in DEFECTS if each.name != "{SLOW}"}}))
"""


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces the probes: the defects of the given names are there, all others are not."""

    def choose(*names: str) -> None:
        monkeypatch.setattr(defects, "is_present", lambda defect: defect.name in names)

    return choose


def examined(path: str) -> dict[str, bool]:
    """What a process finds whose `vllm` comes from `path`, or is the installed one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT))))}
    run = subprocess.run([sys.executable, "-c", EXAMINE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def test_patches_that_are_named_exist() -> None:
    named = {defect.name: defect.patch for defect in defects.DEFECTS if defect.patch is not None}
    assert named == MENDED_BY
    assert all((ROOT / str(defect.patch_file)).is_file() for defect in defects.DEFECTS if defect.patch)


def test_the_installed_vllm_and_a_patched_copy_are_told_apart(tmp_path: Path, patches: Any) -> None:
    stock = examined("")
    patched = examined(str(patches.patched_package(sorted(patches.RELEASE.glob("*.patch")), tmp_path)))
    assert {name for name in stock if stock[name] != patched[name]} == set(MENDED_BY) - {SLOW}
    assert not any(patched[name] for name in MENDED_BY if name != SLOW)


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("vllm")
    monkeypatch.syspath_prepend(str(ROOT / "tests/unit/patches"))
    import patched_vllm

    return patched_vllm


@pytest.mark.parametrize(
    ("family", "defect"),
    [
        ("minimax_m2", defects.SIGMOID),
        ("step3p5", defects.SIGMOID),
        ("laguna", defects.SIGMOID),
        ("laguna", defects.LAGUNA_BIAS),
        ("ernie4_5_moe", defects.SOFTMAX_BIAS),
    ],
)
def test_a_misrouted_family_is_refused_by_name_with_its_patch(
    family: str, defect: defects.Defect, found: Callable[..., None]
) -> None:
    found(defect.name)
    with pytest.raises(EngineError, match=f"{family} cannot be observed: .*; apply patches/.*{defect.patch}.patch"):
        defects.refuse_misrouted_family({"model_type": family})
    found()
    defects.refuse_misrouted_family({"model_type": family})


def test_a_family_with_two_defects_is_told_of_both_patches(found: Callable[..., None]) -> None:
    found("cpu-router-sigmoid", "laguna-correction-bias")
    with pytest.raises(EngineError) as refused:
        defects.refuse_misrouted_family({"model_type": "laguna"})
    assert re.findall(r"\d{4}-[a-z-]+\.patch", str(refused.value)) == [
        "0001-cpu-router-scores.patch",
        "0005-laguna-correction-bias.patch",
    ]


def test_other_families_are_not_even_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(defects, "is_present", lambda defect: asked.append(defect.name) or True)
    for family in ("qwen3_moe", "deepseek_v3", "gpt_oss", "not_a_family"):
        defects.refuse_misrouted_family({"model_type": family})
    assert asked == []


def engine_of(family: str, *operators: str) -> Any:
    """As much of an engine's configuration as is looked at."""
    model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: {"model_type": family}))
    return SimpleNamespace(
        model_config=model, compilation_config=SimpleNamespace(custom_ops=list(operators)), parallel_config=None
    )


def layer_of(**settings: Any) -> Any:
    """A layer with vLLM's own router for CPUs."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return SimpleNamespace(router=CPURouter(top_k=1, global_num_experts=4, **settings))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scoring_func": "sigmoid"}, "cpu-router-sigmoid"),
        ({"e_score_correction_bias": "any"}, "cpu-router-softmax-bias"),
    ],
)
def test_a_family_that_nobody_listed_is_refused_by_its_routers(
    settings: dict[str, str], name: str, found: Callable[..., None]
) -> None:
    found(name)
    with pytest.raises(EngineError, match=r"new_family cannot be observed.*0001-cpu-router-scores\.patch"):
        defects.refuse_misrouted_layers(engine_of("new_family"), [layer_of(**settings)])
    found()
    defects.refuse_misrouted_layers(engine_of("new_family"), [layer_of(**settings)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scoring_func": "sigmoid", "use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1},
        {"scoring_func": "sigmoid", "custom_routing_function": print},
        {"scoring_func": "sqrtsoftplus", "e_score_correction_bias": "any"},
    ],
)
def test_routers_that_are_right_are_accepted(settings: dict[str, Any], found: Callable[..., None]) -> None:
    found(*MENDED_BY)
    layer = layer_of(**settings)
    defects.refuse_misrouted_layers(engine_of("qwen3_moe", "all"), [layer])
    assert layer.router.top_k == 1, "it was looked at, not changed"


@pytest.mark.parametrize(
    ("operators", "refused"),
    [
        (("all",), True),
        (("none",), False),
        (("all", "-rotary_embedding"), False),
        (("none", "+rotary_embedding"), True),
    ],
)
def test_wrong_angles_matter_where_the_operator_runs(
    operators: tuple[str, ...], refused: bool, found: Callable[..., None]
) -> None:
    found("cpu-rotary-heads")
    try:
        defects.refuse_misrouted_layers(engine_of("deepseek_v3", *operators), [])
        message = ""
    except EngineError as error:
        message = str(error)
    assert ("0002-cpu-rope-by-head" in message) == refused


def test_serve_refuses_before_it_becomes_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Callable[..., None]
) -> None:
    pytest.importorskip("vllm")
    import reap_serve.cli.serve  # noqa: F401 - defines the command
    from reap_serve.cli.app import app
    from reap_serve.serve import become

    started: list[object] = []
    monkeypatch.setattr(become, "become", started.append)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ernie4_5_moe"}))
    command = ["serve", str(tmp_path), "--observe", str(tmp_path / "statistics")]
    found("cpu-router-softmax-bias")
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, EngineError)
    assert started == []
    CliRunner().invoke(app, command[:2], catch_exceptions=False)
    found()
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert len(started) == 2, "without statistics, or with the patch, it is served"
