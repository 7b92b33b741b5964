"""Ageing by half-life: weights worked out by hand, and merging that does not care for order or grouping."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rows import random_tokens, statistics_of

from reap_serve.errors import MismatchError, RequestError
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.merge import merge, merge_files
from reap_serve.statistics.record import BATCH_FIELDS, MAX_FIELDS, Statistics
from reap_serve.statistics.saliency import mix_slices, saliency

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
HALF_LIFE = timedelta(days=14)


def observed(name: str, days_ago: float, seed: int = 0) -> Statistics:
    statistics = statistics_of(random_tokens(np.random.default_rng(seed), 30, 2, 4, 2), 4, id_=name, optional=True)
    moment = (NOW - timedelta(days=days_ago)).isoformat()
    window = statistics.header.windows[0].model_copy(update={"ended": moment})
    return replace(statistics, header=statistics.header.model_copy(update={"windows": (window,)}))


def test_what_ended_a_half_life_ago_counts_half() -> None:
    old, new = observed("old", 14, seed=1), observed("new", 0, seed=2)
    aged = merge([old, new], HALF_LIFE)
    for name, values in aged.fields_by_name().items():
        before = old.fields_by_name()[name], new.fields_by_name()[name]
        expected = np.maximum(*before) if name in MAX_FIELDS else before[0] * 0.5 + before[1]
        np.testing.assert_allclose(values, expected, rtol=1e-15, err_msg=name)
    moments = [item.batch_sums() for item in (old, new, aged)]
    for name in BATCH_FIELDS:
        weight = 0.5 if name == "batch_count_SLE" else 0.25
        a, b, both = (getattr(moment, name) for moment in moments)
        np.testing.assert_allclose(both, a * weight + b, rtol=1e-15, err_msg=name)
    assert aged.header.ageing is not None
    assert aged.header.ageing.as_of == NOW.isoformat()


def test_ages_alike_change_no_mean() -> None:
    plain, aged = merge([observed("a", 3)]), merge([observed("a", 3)], HALF_LIFE)
    np.testing.assert_array_equal(*(saliency(mix_slices(item), "reap") for item in (plain, aged)))


@settings(max_examples=25, deadline=None)
@given(ages=st.lists(st.floats(0, 60), min_size=3, max_size=5), cut=st.integers(1, 2))
def test_merging_aged_files_does_not_depend_on_order_or_grouping(ages: list[float], cut: int) -> None:
    items = [observed(f"w{index}", age, seed=index) for index, age in enumerate(ages)]
    at_once = merge(items, HALF_LIFE)
    parts = merge([merge(items[cut:], HALF_LIFE), merge(items[:cut], HALF_LIFE)])
    assert parts.header.ageing == at_once.header.ageing
    for name, values in at_once.fields_by_name().items():
        np.testing.assert_allclose(parts.fields_by_name()[name], values, rtol=1e-12, err_msg=name)
    for name in BATCH_FIELDS:
        np.testing.assert_allclose(
            *(getattr(item.batch_sums(), name) for item in (parts, at_once)), rtol=1e-12, err_msg=name
        )


def test_aged_statistics_are_written_and_read(tmp_path: Path) -> None:
    paths = []
    for name, age in (("old", 20.0), ("new", 1.0)):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        write_statistics(observed(name, age), paths[-1], overwrite=False)
    aged = merge_files(paths, HALF_LIFE)
    write_statistics(aged, str(tmp_path / "aged.safetensors"), overwrite=False)
    back = read_statistics(str(tmp_path / "aged.safetensors"))
    assert back.header.ageing == aged.header.ageing
    for name, values in aged.fields_by_name().items():
        np.testing.assert_array_equal(back.fields_by_name()[name], values, err_msg=name)


def test_what_cannot_be_weighed_is_refused(tmp_path: Path) -> None:
    aged = merge([observed("a", 0)], HALF_LIFE)
    with pytest.raises(MismatchError, match="is weighed by age"):
        merge([aged, observed("b", 0)])
    with pytest.raises(MismatchError, match="half-life of 14 days, 7 are asked for"):
        merge([aged, observed("b", 0)], timedelta(days=7))
    wide = merge([observed("c", 0), observed("d", 9)])
    with pytest.raises(RequestError, match=r"ended 9\.0 days apart"):
        merge([wide], HALF_LIFE)
