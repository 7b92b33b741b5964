"""Groups and averages worked by hand, and properties that hold for any weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reap_serve.errors import ArchitectureError, RequestError
from reap_serve.merge.average import aligned, average, merge_group
from reap_serve.merge.grouping import METHODS, Group, group_layers, hc_smoe, m_smoe, ream
from reap_serve.merge.signature import LayerSignature


def layer(
    counts: list[float],
    reap: list[float] | None = None,
    outputs: list[list[float]] | None = None,
    logits: object = None,
) -> LayerSignature:
    return LayerSignature(
        np.array(counts, float),
        np.array(counts if reap is None else reap, float),
        None if outputs is None else np.array(outputs, float),
        None if logits is None else np.array(logits, float),
    )


# Experts 0 and 1 are wanted by the same tokens, so are 2 and 3; 4 leans to both a little.
COSINE = [
    [1.0, 0.9, 0.1, 0.0, 0.3],
    [0.9, 1.0, 0.2, 0.1, 0.4],
    [0.1, 0.2, 1.0, 0.8, 0.5],
    [0.0, 0.1, 0.8, 1.0, 0.6],
    [0.3, 0.4, 0.5, 0.6, 1.0],
]


def test_m_smoe_gathers_around_the_most_used() -> None:
    # Dominant: 1 (60) and 2 (24). 0 is nearest to 1 (0.9 > 0.1); 3 to 2 (0.8 > 0.1); 4 to 2 (0.5 > 0.4).
    groups = m_smoe(layer([20, 60, 24, 12, 12], logits=COSINE), 2)
    assert groups == (Group(1, (0, 1), (0.25, 0.75)), Group(2, (2, 3, 4), (0.5, 0.25, 0.25)))


def test_hc_smoe_clusters_by_average_linkage() -> None:
    # On a line at 0, 1, 4, 6, 20. Merges: {0,1} at 1, {4,6} at 2; then the averages of the distances between
    # {0,1} and {4,6} are (4+6+3+5)/4 = 4.5, so three clusters are {0,1}, {4,6}, {20} and two are {0,1,4,6}, {20}.
    outputs = [[0.0], [1.0], [4.0], [6.0], [20.0]]
    assert hc_smoe(layer([1, 3, 2, 2, 5], outputs=outputs), 3) == (
        Group(1, (0, 1), (0.25, 0.75)),
        Group(2, (2, 3), (0.5, 0.5)),
        Group(4, (4,), (1.0,)),
    )
    assert hc_smoe(layer([1, 3, 2, 2, 5], outputs=outputs), 2) == (
        Group(1, (0, 1, 2, 3), (0.125, 0.375, 0.25, 0.25)),
        Group(4, (4,), (1.0,)),
    )


def test_average_linkage_is_not_single_linkage() -> None:
    # At 0, 2, 4.5, 7.5 the chain of nearest neighbours 2, 2.5, 3 would join 4.5 to {0, 2}; on average it is
    # (4.5 + 2.5)/2 = 3.5 away from them and 3 from 7.5.
    groups = hc_smoe(layer([1, 1, 1, 1], outputs=[[0.0], [2.0], [4.5], [7.5]]), 2)
    assert [group.members for group in groups] == [(0, 1), (2, 3)]


def test_ream_lets_the_most_salient_choose_first() -> None:
    # Dominant by saliency: 3, then 0. All of 1, 2 and 4 are free and 3 takes them all: its group holds up to 16.
    outputs = np.eye(5).tolist()
    groups = ream(layer([1] * 5, reap=[3, 1, 1, 5, 2], outputs=outputs, logits=COSINE), 2)
    assert groups == (Group(0, (0,), (1.0,)), Group(3, (1, 2, 3, 4), (1 / 9, 1 / 9, 5 / 9, 2 / 9)))


def test_ream_groups_are_bounded() -> None:
    counts = list(range(40, 0, -1))
    everything = layer(counts, outputs=np.ones((40, 2)).tolist(), logits=np.ones((40, 40)))
    assert [len(group.members) for group in ream(everything, 3)] == [16, 16, 8]
    with pytest.raises(RequestError, match="at most 16: 2 of them do not take 40 experts; keep at least 3"):
        ream(everything, 2)


def test_unused_experts_weigh_nothing_beside_a_used_one_and_the_same_among_themselves() -> None:
    outputs = [[0.0], [0.0], [9.0], [9.1]]
    groups = hc_smoe(layer([0, 0, 0, 4], outputs=outputs), 2)
    assert groups == (Group(0, (0, 1), (0.5, 0.5)), Group(3, (2, 3), (0.0, 1.0)))


@pytest.mark.parametrize("method", sorted(METHODS))
@given(seed=st.integers(0, 10_000), num_groups=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_groups_are_a_partition_of_the_asked_size(method: str, seed: int, num_groups: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(12, 6))
    cosine = rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    signature = layer(random.integers(0, 5, 12).tolist(), outputs=rows.tolist(), logits=cosine)
    (groups,) = group_layers((signature,), method, num_groups)
    assert len(groups) == num_groups
    assert sorted(member for group in groups for member in group.members) == list(range(12))
    assert [group.dominant for group in groups] == sorted(group.dominant for group in groups)
    assert all(group.dominant in group.members for group in groups)
    np.testing.assert_allclose([sum(group.weights) for group in groups], 1.0)


def test_what_cannot_be_grouped_is_refused() -> None:
    plain = layer([1, 2, 3])
    with pytest.raises(RequestError, match=r"m-smoe takes logit_gram, .*--extra-sum logit_gram"):
        group_layers((plain,), "m-smoe", 2)
    with pytest.raises(RequestError, match="hc-smoe takes output_sum"):
        group_layers((plain,), "hc-smoe", 2)
    with pytest.raises(RequestError, match="no merging method magic; use one of: m-smoe, hc-smoe, ream"):
        group_layers((plain,), "magic", 2)
    with pytest.raises(RequestError, match="4 groups of 3 experts"):
        group_layers((plain,), "hc-smoe", 4)


def expert(seed: int, units: int = 4, hidden: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "gate_proj.weight": random.normal(size=(units, hidden)).astype(np.float32),
        "up_proj.weight": random.normal(size=(units, hidden)).astype(np.float32),
        "down_proj.weight": random.normal(size=(hidden, units)).astype(np.float32),
    }


def output(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    gate = x @ weights["gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ weights["up_proj.weight"].T)) @ weights["down_proj.weight"].T


def test_the_average_is_weighted() -> None:
    members = [{"w": np.float32([[1, 3]])}, {"w": np.float32([[5, -1]])}]
    assert average(members, (0.25, 0.75))["w"].tolist() == [[4.0, 0.0]]


def test_aligning_undoes_a_permutation_and_changes_no_output() -> None:
    plain = expert(0)
    order = [2, 0, 3, 1]
    shuffled = {
        name: np.take(values, order, axis=1 if name.startswith("down") else 0) for name, values in plain.items()
    }
    for name, values in aligned(plain, shuffled).items():
        np.testing.assert_array_equal(values, plain[name])
    other, x = expert(1), np.random.default_rng(2).normal(size=(5, 3))
    np.testing.assert_allclose(output(aligned(plain, other), x), output(other, x), rtol=1e-5)
    merged = merge_group([plain, shuffled], (0.3, 0.7), 0, aligns=True)
    np.testing.assert_allclose(output(merged, x), output(plain, x), rtol=1e-4)
    assert not np.allclose(output(merge_group([plain, shuffled], (0.3, 0.7), 0, aligns=False), x), output(plain, x))


def test_units_of_unknown_maps_are_refused() -> None:
    unknown = {"gate_up_proj": np.zeros((2, 2), np.float32)}
    with pytest.raises(ArchitectureError, match=r"units of gate_up_proj are not known.*--no-align"):
        aligned(unknown, unknown)
