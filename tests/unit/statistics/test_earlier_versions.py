"""Statistics that earlier releases wrote are read. Each file here was written by the release of its name, from the
tokens that `token_rows` draws with seed 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from token_rows import random_tokens, statistics_of

from reap_serve.statistics.file import read_statistics
from reap_serve.statistics.merge import join_batches, merge_files
from reap_serve.statistics.record import BATCH_FIELDS

WRITTEN = sorted((Path(__file__).parent / "written").glob("*.safetensors"))


def test_there_is_one_of_the_first_release() -> None:
    assert "0.1.0.safetensors" in [path.name for path in WRITTEN]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_it_holds_what_was_written(path: Path) -> None:
    found = read_statistics(str(path))
    tokens = random_tokens(np.random.default_rng(0), 60, 2, 6, 2, num_slices=2)
    parts = [statistics_of(tokens[start : start + 20], 6, ("chat", "code"), optional=True) for start in (0, 20, 40)]
    expected = join_batches(parts)
    assert found.header.provenance.tool == f"reap-serve {path.stem}"
    assert (found.header.model, found.header.layers) == (expected.header.model, expected.header.layers)
    assert found.header.slices == ("chat", "code")
    assert set(found.fields_by_name()) == set(expected.fields_by_name())
    for name, values in expected.fields_by_name().items():
        np.testing.assert_allclose(found.fields_by_name()[name], values, rtol=1e-12, err_msg=name)
    for name in BATCH_FIELDS:
        np.testing.assert_allclose(getattr(found.batch_sums(), name), getattr(expected.batch_sums(), name), rtol=1e-12)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_it_merges(path: Path) -> None:
    found = read_statistics(str(path))
    merged = merge_files([str(path)])
    for name, values in found.fields_by_name().items():
        assert np.array_equal(merged.fields_by_name()[name], values), name
