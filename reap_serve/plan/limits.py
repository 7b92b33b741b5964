"""Which numbers of experts per layer the router, the engine and its kernels take, and why not the others.

Stock vLLM serves several wrong counts without a word (it turns group routing off, or leaves memory uninitialised),
so each count is checked before a plan is made. File names below are of vLLM 0.32, under `model_executor/layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reap_serve.architectures.groups import SCORED_MEMBERS, reachable_size
from reap_serve.errors import PlanError

# vLLM's sqrtsoftplus top-k kernel is instantiated for these counts only and has no fallback.
DEEPSEEK_V4_COUNTS = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576})
# `fused_moe/configs`: expert counts for which vLLM ships tuned Triton tables.
TUNED_COUNTS = (8, 16, 20, 32, 40, 60, 62, 64, 72, 128, 129, 160, 256, 384, 512)
# `moe_align_block_size` sorts one thread an expert.
TRITON_COUNT_LIMIT = 1024
TRTLLM_FP8_COUNT_LIMIT = 512


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What bounds the count on the model's side.

    Attributes:
        architecture: `model_type` of the text configuration.
        num_experts: Routed experts per layer, E.
        top_k: Experts chosen per token.
        num_groups: Groups the router chooses from first, 1 when it does not.
        top_k_groups: Groups chosen per token.
        quantization: Quantisation method of the checkpoint, None when unquantised.
    """

    architecture: str
    num_experts: int
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class ServingTarget:
    """How the pruned model will be served.

    Attributes:
        multiple_of: The user's own granularity.
        tensor_parallel_size: vLLM's `--tensor-parallel-size`.
        expert_parallel_size: Ranks that share the experts under `--enable-expert-parallel`.
        moe_backend: vLLM's `--moe-backend`, None when vLLM chooses.
    """

    multiple_of: int = 1
    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1
    moe_backend: str | None = None

    def __post_init__(self) -> None:
        for option in ("multiple_of", "tensor_parallel_size", "expert_parallel_size"):
            value = getattr(self, option)
            if value < 1:
                raise PlanError(f"--{option.replace('_', '-')} is {value}", "give 1 or more")


@dataclass(frozen=True, slots=True)
class CountRule:
    """One condition on the number of experts that a layer keeps.

    Attributes:
        allows: Whether a count meets it.
        condition: Completes "the count must be ...".
        reason: Whose limit it is, and what happens otherwise.
    """

    allows: Callable[[int], bool]
    condition: str
    reason: str


@dataclass(frozen=True, slots=True)
class CountLimits:
    """All conditions together.

    Attributes:
        num_experts: Experts per layer before pruning.
        rules: The conditions.
        allowed: Counts that meet all of them, ascending; never empty.
    """

    num_experts: int
    rules: tuple[CountRule, ...]
    allowed: tuple[int, ...]

    @property
    def smallest(self) -> int:
        """The smallest allowed count."""
        return self.allowed[0]

    def require(self, count: int, asked: str) -> None:
        """Refuses a count that breaks a condition.

        Args:
            count: Experts per layer.
            asked: What the user wrote, to begin the message with.

        Raises:
            PlanError: Names every broken condition with its reason, and the nearest counts that meet all.
        """
        broken = [rule for rule in self.rules if not rule.allows(count)]
        if broken:
            raise PlanError(
                f"{asked} keeps {count} of {self.num_experts} experts per layer, but {_join(broken)}", self._near(count)
            )

    def nearest(self, count: int) -> int:
        """The allowed count nearest to `count`; of two equally near ones the larger, which keeps more of the model."""
        return min(self.allowed, key=lambda allowed: (abs(allowed - count), -allowed))

    def _near(self, count: int) -> str:
        below = [allowed for allowed in self.allowed if allowed < count][-1:]
        above = [allowed for allowed in self.allowed if allowed > count][:1]
        return f"keep {' or '.join(str(near) for near in below + above)} experts, or change the limit that is yours"


def count_limits(model: ModelLimits, target: ServingTarget) -> CountLimits:
    """The conditions on the count, and the counts that meet them.

    Raises:
        PlanError: No count from 1 to E meets all of them.
    """
    rules = (*_router_rules(model), *_parallel_rules(target), *_kernel_rules(model, target))
    allowed = tuple(count for count in range(1, model.num_experts + 1) if all(rule.allows(count) for rule in rules))
    if not allowed:
        raise PlanError(
            f"no count from 1 to {model.num_experts} experts per layer meets all limits: {_join(rules)}",
            "relax --multiple-of, --tensor-parallel-size, --expert-parallel-size or --moe-backend",
        )
    return CountLimits(model.num_experts, rules, allowed)


def _router_rules(model: ModelLimits) -> list[CountRule]:
    top_k, groups, open_groups = model.top_k, model.num_groups, model.top_k_groups
    rules = [
        CountRule(
            lambda count: 1 <= count <= model.num_experts,
            f"from 1 to {model.num_experts}",
            "these are the experts of a layer",
        ),
        CountRule(
            lambda count: count >= top_k, f"at least {top_k}", f"the router chooses top_k = {top_k} experts per token"
        ),
    ]
    if groups > 1:
        reachable = reachable_size(top_k, open_groups)
        rules += [
            CountRule(
                lambda count: count % groups == 0 and count >= SCORED_MEMBERS * groups,
                f"a multiple of {groups} and more than {groups}",
                f"the router chooses among {groups} equal groups of at least two; vLLM turns group routing off without "
                "a word otherwise",
            ),
            CountRule(
                lambda count: count // groups >= reachable,
                f"at least {reachable * groups}",
                f"a token reaches {open_groups} of {groups} groups, which must hold top_k = {top_k} experts",
            ),
        ]
    return rules


def _parallel_rules(target: ServingTarget) -> list[CountRule]:
    multiple, tensor, expert = target.multiple_of, target.tensor_parallel_size, target.expert_parallel_size
    rules = []
    if multiple > 1:
        rules.append(CountRule(lambda count: count % multiple == 0, f"a multiple of {multiple}", "--multiple-of"))
    if tensor > 1:
        rules.append(
            CountRule(
                lambda count: count >= tensor,
                f"at least {tensor}",
                f"--tensor-parallel-size {tensor}: vLLM's models refuse more ranks than experts",
            )
        )
    if expert > 1:
        rules.append(
            CountRule(
                lambda count: count % expert == 0,
                f"a multiple of {expert}",
                f"--expert-parallel-size {expert}: EPLB, DeepEP and gpt_oss need equal shares a rank",
            )
        )
    return rules


def _kernel_rules(model: ModelLimits, target: ServingTarget) -> list[CountRule]:
    rules = [
        CountRule(
            lambda count: count < TRITON_COUNT_LIMIT,
            f"below {TRITON_COUNT_LIMIT}",
            "vLLM's kernels sort tokens with one thread an expert",
        )
    ]
    if model.architecture.startswith("deepseek_v4"):
        counts = ", ".join(str(count) for count in sorted(DEEPSEEK_V4_COUNTS) if count <= model.num_experts)
        rules.append(
            CountRule(
                DEEPSEEK_V4_COUNTS.__contains__,
                f"one of {counts}",
                "vLLM's sqrtsoftplus top-k kernel has no other and no fallback (vllm#51521)",
            )
        )
    if model.quantization == "fp8" and target.moe_backend == "flashinfer_trtllm":
        rules.append(
            CountRule(
                lambda count: count % 4 == 0 and count <= TRTLLM_FP8_COUNT_LIMIT,
                f"a multiple of 4 and at most {TRTLLM_FP8_COUNT_LIMIT}",
                "--moe-backend flashinfer_trtllm on FP8 weights asserts it",
            )
        )
    return rules


def count_notes(model: ModelLimits, target: ServingTarget, counts: tuple[int, ...]) -> list[str]:
    """What is allowed but worth knowing about the counts of a plan."""
    notes = []
    untuned = sorted({count for count in counts if count not in TUNED_COUNTS})
    if untuned:
        near = sorted({min(TUNED_COUNTS, key=lambda tuned: abs(tuned - count)) for count in untuned})
        notes.append(
            f"vLLM ships no tuned Triton table for {_list(untuned)} experts and uses its default configuration; "
            f"the nearest tuned counts are {_list(near)}"
        )
    if model.quantization == "fp8" and target.moe_backend is None:
        refused = sorted({count for count in counts if count % 4 or count > TRTLLM_FP8_COUNT_LIMIT})
        if refused:
            notes.append(
                f"{_list(refused)} experts are not a multiple of 4 up to {TRTLLM_FP8_COUNT_LIMIT}: on Blackwell serve "
                "with --moe-backend triton, since TensorRT-LLM's FP8 kernels assert it"
            )
    return notes


def _list(counts: list[int]) -> str:
    return ", ".join(str(count) for count in counts)


def _join(rules: tuple[CountRule, ...] | list[CountRule]) -> str:
    return " and ".join(f"it must be {rule.condition} ({rule.reason})" for rule in rules)
