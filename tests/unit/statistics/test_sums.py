"""Every sum is declared once, and what follows from its declaration is complete."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from reap_serve.statistics.record import EXPERT_SUMS, LAYER_FIELD, SUMS, ExpertSums, Floats, zeros
from reap_serve.statistics.sums import Merge, Of, declared, sums_of


def test_each_field_of_the_sums_is_declared() -> None:
    assert [each.field for each in EXPERT_SUMS] == list(ExpertSums.__dataclass_fields__)
    assert LAYER_FIELD == "layer_token_count_SPL"
    assert set(SUMS) == {*ExpertSums.__dataclass_fields__, LAYER_FIELD} | {
        "batch_count_SLE",
        "batch_weighted_sq_SLE",
        "batch_cross_SLE",
        "batch_token_sq_SLE",
    }


def test_a_name_and_its_axes_come_from_the_field() -> None:
    gram = SUMS["logit_gram_SPLEE"]
    assert (gram.name, gram.axes, gram.is_per_expert) == ("logit_gram", "SPLEE", False)
    assert gram.stored_shape(3, 8, (3, 8, 8)) == (3, 8, 8)
    assert SUMS["output_sum_SPLEH"].stored_shape(3, 8, (3, 8, 64)) == (3, 8, 64)
    assert SUMS[LAYER_FIELD].stored_shape(3, 8, (3,)) == (3,)
    assert SUMS["norm_sum_SPLE"].is_per_expert


def test_maxima_merge_by_the_larger_and_sums_by_addition() -> None:
    left, right = np.array([1.0, 5.0]), np.array([4.0, 2.0])
    assert SUMS["norm_max_SPLE"].merge.combine(left, right).tolist() == [4, 5]
    assert SUMS["norm_sum_SPLE"].merge.combine(left, right).tolist() == [5, 7]
    maxima = {name for name, each in SUMS.items() if each.merge is Merge.MAX}
    assert {"norm_max_SPLE", "activation_max_SPLE"} <= maxima


def test_a_sum_that_files_may_lack_is_asked_for_only_if_it_needs_more_than_routes() -> None:
    @dataclass
    class Declared:
        old_sum_SPLE: Floats = field(metadata=declared(Of.ROUTES))
        new_sum_SPLE: Floats | None = field(default=None, metadata=declared(Of.ROUTES))
        large_sum_SPLEH: Floats | None = field(default=None, metadata=declared(Of.OUTPUTS))

    found = sums_of(Declared)
    assert [(each.name, each.is_optional, each.is_asked_for) for each in found] == [
        ("old_sum", False, False),
        ("new_sum", True, False),
        ("large_sum", True, True),
    ]
    assert [each.name for each in EXPERT_SUMS if each.is_asked_for and not each.is_optional] == []


@pytest.mark.parametrize("each", SUMS.values(), ids=lambda each: each.name)
def test_counts_are_integers(each: object) -> None:
    assert zeros(each.field, (1,)).dtype == (np.int64 if each.name.endswith("count") else np.float64)  # type: ignore[attr-defined]


def test_every_sum_of_the_recorder_has_a_formula() -> None:
    from reap_serve.record.accumulate import FORMULAS, MAX_COLUMNS, SUM_COLUMNS
    from reap_serve.record.extra_sums import LOGIT_FORMULAS, OUTPUT_FORMULAS

    assert SUM_COLUMNS[0] == "token_count", "counts are read there"
    by_kind = {of: {each.name for each in EXPERT_SUMS if each.of is of} for of in Of}
    assert set(FORMULAS) == by_kind[Of.ROUTES] == {*SUM_COLUMNS, *MAX_COLUMNS}
    assert set(OUTPUT_FORMULAS) == by_kind[Of.OUTPUTS]
    assert set(LOGIT_FORMULAS) == by_kind[Of.LOGITS]
