"""Groups of experts: worked by hand."""

from __future__ import annotations

import pytest

from reap_serve.architectures.groups import reachable_size, sizes_of, smallest_size


@pytest.mark.parametrize(
    ("top_k", "top_k_groups", "reachable", "smallest"),
    # DeepSeek-V3 takes 8 experts from 4 groups; 3 of 2 groups need two in one of them.
    [(8, 4, 2, 2), (8, 1, 8, 8), (3, 2, 2, 2), (2, 4, 1, 2), (1, 1, 1, 2), (9, 4, 3, 3)],
)
def test_a_group_holds_what_a_token_may_choose_and_what_scores_it(
    top_k: int, top_k_groups: int, reachable: int, smallest: int
) -> None:
    assert (reachable_size(top_k, top_k_groups), smallest_size(top_k, top_k_groups)) == (reachable, smallest)


def test_groups_are_consecutive_runs() -> None:
    assert sizes_of((0, 1, 2, 5, 11), num_experts=12, num_groups=4) == [3, 1, 0, 1]
    assert sizes_of((), num_experts=4, num_groups=2) == [0, 0]
