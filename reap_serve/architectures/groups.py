"""Routers that choose groups of experts first, then experts within them: the sizes that a group may have.

Groups are consecutive runs of equal length of the experts' ids. A group is scored by its best two members, and the
groups that a token reaches must hold the top-k experts between them (vLLM's `grouped_topk`, as DeepSeek-V3 has it).
Counts (`plan.limits`), plans by hand (`prune.decide`) and checkpoints (`prune.inspect`) are held to it here alone.
"""

from __future__ import annotations

from collections.abc import Sequence

# Members by which a group is scored.
SCORED_MEMBERS = 2


def reachable_size(top_k: int, top_k_groups: int) -> int:
    """Experts that a group needs at least, so that the groups of a token hold top-k of them."""
    return -(-top_k // top_k_groups)


def smallest_size(top_k: int, top_k_groups: int) -> int:
    """Experts that a group needs at least."""
    return max(SCORED_MEMBERS, reachable_size(top_k, top_k_groups))


def sizes_of(kept: Sequence[int], num_experts: int, num_groups: int) -> list[int]:
    """How many of the kept experts are in each group of the full router.

    Args:
        kept: Ids before pruning.
        num_experts: Experts before pruning; a multiple of `num_groups`.
        num_groups: Groups.
    """
    size = num_experts // num_groups
    return [sum(expert // size == group for expert in kept) for group in range(num_groups)]
