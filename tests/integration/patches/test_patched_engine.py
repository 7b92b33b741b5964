"""A vLLM with all patches serves what stock vLLM on the CPU gets wrong or refuses, as transformers computes it.

One process loads one engine after the other; the installed vLLM is only read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("vllm")

from family_checkpoint import build  # noqa: E402
from masked_base import masked  # noqa: E402
from patched_vllm import RELEASE, patched_package  # noqa: E402
from pruned_pairs import OPTIONS, write_plan  # noqa: E402
from serve_prompt import PROMPT  # noqa: E402
from tiny_families import FAMILIES, NUM_EXPERTS  # noqa: E402

from reap_serve.prune.run import prune  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]

TOLERANCE = 1e-5
BIASED_OR_SIGMOID = ("ernie4_5_moe", "minimax_m2", "laguna")
ROPE_BY_HEAD = ("deepseek_v3", "glm4_moe_lite", "lfm2_moe")
UNEQUAL = "qwen3_moe"
# On CPUs with AMX vLLM 0.32 takes a kernel for latent attention that packs bfloat16 only, whatever the dtype is.
OPTIONS_OF = {name: {"attention_backend": "CPU_MLA"} for name in ("deepseek_v3", "glm4_moe_lite")}
KEPT: Mapping[int, tuple[int, ...]] = {0: (1, 4), 1: (0, 2, 3, 5, 7), 2: (3, 6, 7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("patched")


@pytest.fixture(scope="module")
def answers(folder: Path) -> Mapping[str, Mapping[str, object]]:
    """The patched vLLM's answer by family: whole models, and qwen3_moe with other counts per layer."""
    for name in (*BIASED_OR_SIGMOID, *ROPE_BY_HEAD, UNEQUAL):
        build(FAMILIES[name], folder / name, servable=True)
    plan = write_plan(folder / "plan.json", KEPT, NUM_EXPERTS)
    options = replace(OPTIONS, unequal_layers=True)
    pruned = prune(str(folder / UNEQUAL), plan, folder / "pruned", options, overwrite=False).output
    paths = {name: str(folder / name) for name in (*BIASED_OR_SIGMOID, *ROPE_BY_HEAD)} | {UNEQUAL: str(pruned)}
    jobs = [{"name": name, "path": path, "options": OPTIONS_OF.get(name, {})} for name, path in paths.items()]
    package = patched_package(sorted(RELEASE.glob("*.patch")), folder / "site")
    run = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("serve_patched.py")),
            json.dumps({"prompt": PROMPT, "jobs": jobs}),
        ],
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"name"')]
    assert lines, run.stderr[-3000:]
    assert all(line["vllm"].startswith(str(package)) for line in lines)
    return {line["name"]: line for line in lines}


def expected(directory: Path, dropped: Mapping[int, tuple[int, ...]] | None = None) -> torch.Tensor:
    """transformers' log-probabilities, of a masked model where experts are dropped."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        if dropped is None:
            logits = model(torch.tensor([PROMPT])).logits[0]
        else:
            with masked(model, dropped, NUM_EXPERTS):
                logits = model(torch.tensor([PROMPT])).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def distance(answer: Mapping[str, object], reference: torch.Tensor) -> float:
    assert "error" not in answer, answer["error"]
    return float((torch.tensor(answer["logprobs"]) - reference).abs().max())


@pytest.mark.parametrize("name", [*BIASED_OR_SIGMOID, *ROPE_BY_HEAD])
def test_the_family_is_served_as_transformers_computes_it(
    name: str, folder: Path, answers: Mapping[str, Mapping[str, object]], record_property: pytest.RecordProperty
) -> None:
    found = distance(answers[name], expected(folder / name))
    record_property("largest_difference", found)
    assert found < TOLERANCE


def test_unequal_layers_are_served_as_the_masked_base(
    folder: Path, answers: Mapping[str, Mapping[str, object]], record_property: pytest.RecordProperty
) -> None:
    dropped = {layer: tuple(set(range(NUM_EXPERTS)) - set(kept)) for layer, kept in KEPT.items()}
    reference = expected(folder / UNEQUAL, dropped)
    found = distance(answers[UNEQUAL], reference)
    record_property("largest_difference", found)
    assert found < TOLERANCE
    assert float((reference - expected(folder / UNEQUAL)).abs().max()) > 100 * TOLERANCE, "the mask must matter"
