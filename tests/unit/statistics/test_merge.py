"""Merging: the same sums in any order and grouping, one model, no window twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_rows import Tokens, fingerprint, header, random_tokens, statistics_of, window

from reap_serve.errors import InputFileError, MismatchError, RequestError
from reap_serve.statistics.file import write_statistics
from reap_serve.statistics.merge import join_batches, merge, merge_files, select_slices
from reap_serve.statistics.record import BATCH_FIELDS, Statistics, is_count

SLICES = ("chat", "code", "tools")
NUM_EXPERTS = 5


def parts_of(seed: int, num_parts: int) -> tuple[Tokens, list[Statistics]]:
    """Tokens, and the statistics of consecutive parts of them; each part knows only the slices that it saw."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 30, 2, NUM_EXPERTS, 2, num_slices=len(SLICES))
    edges = [0, *sorted(rng.choice(np.arange(1, 30), num_parts - 1, replace=False).tolist()), 30]
    parts = []
    for index, (start, end) in enumerate(pairwise(edges)):
        part = statistics_of(tokens[start:end], NUM_EXPERTS, SLICES, f"w{index}")
        parts.append(select_slices(part, [SLICES[s] for s in sorted(set(tokens.slice_T[start:end].tolist()))]))
    return tokens, parts


def assert_close(left: Statistics, right: Statistics) -> None:
    assert left.header.slices == right.header.slices
    assert left.header.layers == right.header.layers
    assert left.header.windows == right.header.windows
    pairs = [(name, values, right.fields_by_name()[name]) for name, values in left.fields_by_name().items()]
    pairs += [(name, getattr(left.batch_sums(), name), getattr(right.batch_sums(), name)) for name in BATCH_FIELDS]
    for name, values, found in pairs:
        if is_count(name) or name.endswith("_max_SPLE"):
            assert np.array_equal(values, found), name
        else:
            np.testing.assert_allclose(found, values, rtol=1e-12, atol=0, err_msg=name)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), num_parts=st.integers(1, 6))
def test_merged_parts_are_the_statistics_of_all_tokens(seed: int, num_parts: int) -> None:
    tokens, parts = parts_of(seed, num_parts)
    whole, merged = statistics_of(tokens, NUM_EXPERTS, SLICES), merge(parts)
    seen = select_slices(whole, list(merged.header.slices))
    for name, values in seen.fields_by_name().items():
        np.testing.assert_allclose(merged.fields_by_name()[name], values, rtol=1e-12, err_msg=name)
    counts = [select_or_zero(part, merged.header.slices) for part in parts]
    np.testing.assert_array_equal(merged.batch_sums().batch_token_sq_SLE, np.sum(np.square(counts), axis=0))


def select_or_zero(part: Statistics, slices: Sequence[str]) -> np.ndarray:
    """Token counts of one part over given slices, phases added up."""
    counts_SLE = np.zeros((len(slices), len(part.header.layers), NUM_EXPERTS))
    for s, name in enumerate(part.header.slices):
        counts_SLE[slices.index(name)] = part.sums.token_count_SPLE[s].sum(axis=0)
    return counts_SLE


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
def test_order_does_not_matter_to_the_bit(seed: int, order: list[int]) -> None:
    _, parts = parts_of(seed, 4)
    left, right = merge(parts), merge([parts[index] for index in order])
    assert left.header.model_copy(update={"provenance": right.header.provenance}) == right.header
    for name, values in left.fields_by_name().items():
        assert np.array_equal(values, right.fields_by_name()[name]), name


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), split=st.integers(1, 3))
def test_grouping_does_not_matter(seed: int, split: int) -> None:
    _, parts = parts_of(seed, 4)
    assert_close(merge(parts), merge([merge(parts[:split]), merge(parts[split:])]))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_files_merge_like_statistics(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("parts")
    _, parts = parts_of(seed, 4)
    # One file is a merge itself, so that files with and without moments of batches meet.
    for index, part in enumerate([merge(parts[:2]), *parts[2:]]):
        write_statistics(part, str(folder / f"{index}.safetensors"), overwrite=False)
    merged = merge_files([str(folder)])
    assert_close(merge(parts), merged)
    np.testing.assert_array_equal(merged.batch_sums().batch_count_SLE, merge(parts).batch_sums().batch_count_SLE)


def test_optional_sums_survive_only_where_all_have_them() -> None:
    tokens = random_tokens(np.random.default_rng(0), 20, 2, NUM_EXPERTS, 2)
    halves = [
        statistics_of(tokens[:10], NUM_EXPERTS, id_="w0", optional=True),
        statistics_of(tokens[10:], NUM_EXPERTS, id_="w1", optional=True),
    ]
    whole = statistics_of(tokens, NUM_EXPERTS, optional=True)
    merged = merge(halves)
    assert set(merged.fields_by_name()) == set(whole.fields_by_name())
    for name, values in whole.fields_by_name().items():
        np.testing.assert_allclose(merged.fields_by_name()[name], values, rtol=1e-12)
    mixed = merge([halves[0], statistics_of(tokens[10:], NUM_EXPERTS, id_="w1")])
    assert mixed.sums.output_sum_SPLEH is None
    assert mixed.sums.coselection_count_SPLEE is None
    np.testing.assert_allclose(mixed.sums.gate_sum_SPLE, whole.sums.gate_sum_SPLE, rtol=1e-12)


def test_layers_of_pipeline_ranks_fit_together() -> None:
    tokens = random_tokens(np.random.default_rng(0), 20, 3, NUM_EXPERTS, 2)
    whole = statistics_of(tokens, NUM_EXPERTS)
    ranks = []
    for id_, rows in (("w0", (0, 2)), ("w1", (1,))):
        fields = {name: values[:, :, list(rows)] for name, values in whole.fields_by_name().items()}
        ranks.append(Statistics.from_fields(header(whole.header.model, ("default",), id_, rows), fields))
        assert not ranks[-1].header.complete
    merged = merge(ranks)
    assert merged.header.complete
    for name, values in whole.fields_by_name().items():
        assert np.array_equal(merged.fields_by_name()[name], values), name


def test_a_layer_with_two_names_is_refused() -> None:
    tokens = random_tokens(np.random.default_rng(0), 5, 1, NUM_EXPERTS, 2)
    left, right = statistics_of(tokens, NUM_EXPERTS, id_="w0"), statistics_of(tokens, NUM_EXPERTS, id_="w1")
    layers = (right.header.layers[0].model_copy(update={"name": "other.0"}),)
    with pytest.raises(MismatchError, match=r"layer 0 other\.0"):
        merge([left, replace(right, header=right.header.model_copy(update={"layers": layers}))])


def test_another_model_is_refused_with_the_field_named(tmp_path: Path) -> None:
    tokens = random_tokens(np.random.default_rng(0), 5, 1, NUM_EXPERTS, 2)
    left, right = statistics_of(tokens, NUM_EXPERTS, id_="w0"), statistics_of(tokens, NUM_EXPERTS, id_="w1")
    model = fingerprint(1, NUM_EXPERTS, 2, weights="x")
    right = replace(right, header=right.header.model_copy(update={"model": model}))
    with pytest.raises(MismatchError, match="weights_sha256 is www"):
        merge([left, right])
    for name, statistics in (("a", left), ("b", right)):
        write_statistics(statistics, str(tmp_path / name), overwrite=False)
    with pytest.raises(MismatchError, match="weights_sha256 is www") as caught:
        merge_files([str(tmp_path / "a"), str(tmp_path / "b")])
    assert str(tmp_path / "b") in str(caught.value)


def test_a_window_never_counts_twice(tmp_path: Path) -> None:
    _, parts = parts_of(0, 3)
    with pytest.raises(MismatchError, match="window w1"):
        merge([*parts, parts[1]])
    with pytest.raises(MismatchError, match="window w1"):
        merge([merge(parts), parts[1]])
    write_statistics(merge(parts), str(tmp_path / "merged"), overwrite=False)
    write_statistics(parts[1], str(tmp_path / "part"), overwrite=False)
    with pytest.raises(MismatchError, match="window w1"):
        merge_files([str(tmp_path / "part"), str(tmp_path / "merged")])


def test_nothing_to_merge(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to merge"):
        merge([])
    with pytest.raises(InputFileError, match="holds no"):
        merge_files([str(tmp_path)])


def test_engines_are_listed_and_windows_ordered_by_time() -> None:
    _, parts = parts_of(0, 2)
    later = parts[0].header.model_copy(update={"windows": (window("w9", 5),), "engine": {"vllm": "0.33.0"}})
    merged = merge([replace(parts[0], header=later), parts[1]])
    assert merged.header.engine == {"vllm": "0.32.0, 0.33.0"}
    assert [found.id for found in merged.header.windows] == ["w1", "w9"]


def test_batches_of_one_window_are_joined() -> None:
    tokens = random_tokens(np.random.default_rng(3), 40, 2, NUM_EXPERTS, 2)
    parts = [statistics_of(tokens[start : start + 10], NUM_EXPERTS, id_="same") for start in range(0, 40, 10)]
    joined = join_batches(parts)
    (found,) = joined.header.windows
    assert (found.id, found.requests, found.prompt_tokens_total, found.prompt_tokens_computed) == ("same", 12, 120, 80)
    whole = statistics_of(tokens, NUM_EXPERTS)
    np.testing.assert_allclose(joined.sums.gate_sum_SPLE, whole.sums.gate_sum_SPLE, rtol=1e-12)
    totals = np.array([part.sums.weighted_norm_sum_SPLE.sum(axis=1) for part in parts])
    counts = np.array([part.sums.token_count_SPLE.sum(axis=1) for part in parts])
    moments = joined.batch_sums()
    np.testing.assert_allclose(moments.batch_weighted_sq_SLE, (totals**2).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.batch_cross_SLE, (totals * counts).sum(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(moments.batch_token_sq_SLE, (counts**2).sum(axis=0))
    np.testing.assert_array_equal(moments.batch_count_SLE, (counts > 0).sum(axis=0))
    # One at a time gives the same.
    running = join_batches(parts[:1])
    for part in parts[1:]:
        running = join_batches([running, part])
    assert_close(joined, running)


def test_the_fraction_of_joined_batches_is_that_of_all_real_tokens() -> None:
    tokens = random_tokens(np.random.default_rng(4), 20, 2, NUM_EXPERTS, 2)
    parts = []
    for (start, end), fraction in zip(((0, 5), (5, 20), (20, 20)), (0.5, 1.0, 0.1), strict=True):
        part = statistics_of(tokens[start:end], NUM_EXPERTS, id_="same")
        (window,) = part.header.windows
        windows = (window.model_copy(update={"sample_fraction": fraction}),)
        parts.append(replace(part, header=part.header.model_copy(update={"windows": windows})))
    (joined,) = join_batches(parts).header.windows
    assert joined.sample_fraction == pytest.approx(20 / (5 / 0.5 + 15))


def test_selecting_an_unknown_slice_lists_those_there() -> None:
    _, parts = parts_of(0, 1)
    with pytest.raises(RequestError, match="use one of: chat, code, tools"):
        select_slices(parts[0], ["prose"])
