"""Live writing: whole files, nothing lost when a disk fails, small slices held back, kill -9 survived."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from token_rows import Tokens, random_tokens, statistics_of

from reap_serve.statistics.file import read_statistics
from reap_serve.statistics.merge import merge_files
from reap_serve.statistics.privacy import withhold_small_slices
from reap_serve.statistics.rotation import STALE_SECONDS, StatisticsWriter

ROOT = Path(__file__).parents[3]
NUM_EXPERTS = 4


@pytest.fixture
def tokens() -> Tokens:
    return random_tokens(np.random.default_rng(0), 120, 2, NUM_EXPERTS, 2)


def patient(directory: Path | str, minimum: int = 1) -> StatisticsWriter:
    """A writer whose thread does nothing by itself before it is woken."""
    return StatisticsWriter(str(directory), interval_seconds=3600, minimum_tokens_per_slice=minimum)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened in 10 s")


def test_each_offer_becomes_a_file_and_all_together_the_whole(tokens: Tokens, tmp_path: Path) -> None:
    writer = patient(tmp_path)
    for index, start in enumerate(range(0, 120, 40)):
        writer.offer(statistics_of(tokens[start : start + 40], NUM_EXPERTS, id_=f"w{index}"))
        wait_for(lambda wanted=index + 1: writer.status().files_written == wanted)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    merged, whole = merge_files([str(tmp_path)]), statistics_of(tokens, NUM_EXPERTS)
    np.testing.assert_array_equal(merged.sums.token_count_SPLE, whole.sums.token_count_SPLE)
    np.testing.assert_allclose(merged.sums.weighted_norm_sum_SPLE, whole.sums.weighted_norm_sum_SPLE, rtol=1e-12)
    status = writer.status()
    assert (status.tokens_written, status.tokens_pending, status.write_failures) == (120, 0, 0)


def test_a_restarted_writer_continues_in_new_files(tokens: Tokens, tmp_path: Path) -> None:
    for index in range(2):
        writer = patient(tmp_path)
        writer.offer(statistics_of(tokens[index * 60 : index * 60 + 60], NUM_EXPERTS, id_=f"w{index}"))
        writer.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert sum(merge_files([str(tmp_path)]).tokens_per_slice()) == 120


def test_closing_writes_what_was_offered_and_may_be_repeated(tokens: Tokens, tmp_path: Path) -> None:
    writer = patient(tmp_path)
    writer.offer(statistics_of(tokens, NUM_EXPERTS))
    writer.close()
    writer.close()
    assert sum(read_statistics(str(next(tmp_path.iterdir()))).tokens_per_slice()) == 120


def test_nothing_offered_leaves_no_file(tmp_path: Path) -> None:
    writer = patient(tmp_path / "never")
    assert writer.flush()
    writer.close()
    assert not (tmp_path / "never").exists()


def test_sums_outlive_an_unwritable_directory(tokens: Tokens, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "statistics"
    directory.write_text("a file stands where the directory should be")
    writer = patient(directory)
    with caplog.at_level(logging.INFO):
        for index in range(2):
            writer.offer(statistics_of(tokens[index * 40 : index * 40 + 40], NUM_EXPERTS, id_=f"w{index}"))
            assert not writer.flush()
        wait_for(lambda: not writer._wake.is_set())
        status = writer.status()
        assert status.tokens_pending == 80
        assert status.write_failures >= 2
        assert "statistics" in (status.last_error or "")
        directory.unlink()
        writer.offer(statistics_of(tokens[80:], NUM_EXPERTS, id_="w2"))
        writer.close()
    # Logged when it begins and when it ends, not at every attempt.
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert sum(merge_files([str(directory)]).tokens_per_slice()) == 120
    assert writer.status().tokens_pending == 0


def test_a_full_disk_leaves_nothing_half_written(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    writer = patient(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        writer.offer(statistics_of(tokens, NUM_EXPERTS))
        assert not writer.flush()
        # The thread of the writer may be trying as well.
        wait_for(lambda: not list(tmp_path.iterdir()))
    assert writer.flush()
    writer.close()
    assert sum(merge_files([str(tmp_path)]).tokens_per_slice()) == 120


def test_a_write_that_fails_after_the_renaming_counts_nothing_twice(
    tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    writer = patient(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("reap_serve.publish.sync_directory", fails)
        writer.offer(statistics_of(tokens[:60], NUM_EXPERTS, id_="w0"))
        assert not writer.flush()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    writer.offer(statistics_of(tokens[60:], NUM_EXPERTS, id_="w1"))
    writer.close()
    merged = merge_files([str(tmp_path)])
    assert sum(merged.tokens_per_slice()) == 120


def test_small_slices_wait_until_they_are_large_enough(tmp_path: Path) -> None:
    tokens = random_tokens(np.random.default_rng(1), 90, 2, NUM_EXPERTS, 2)
    tokens.slice_T[:] = np.tile([0, 0, 1], 30)
    slices = ("large", "small")
    writer = patient(tmp_path, minimum=15)
    slices_of_files = []
    for index in range(3):
        writer.offer(statistics_of(tokens[index * 30 : index * 30 + 30], NUM_EXPERTS, slices, f"w{index}"))
        writer.flush()
        wait_for(lambda wanted=index + 1: writer.status().files_written == wanted)
        slices_of_files.append(read_statistics(str(max(tmp_path.iterdir()))).header.slices)
    # 20 tokens of `large` a time; `small` has 10, then 20, then again 10.
    assert slices_of_files == [("large",), slices, ("large",)]
    assert writer.status().tokens_pending == 10
    writer.close()
    merged = merge_files([str(tmp_path)])
    assert dict(zip(merged.header.slices, merged.tokens_per_slice(), strict=True)) == {"large": 60, "small": 20}
    # The requests of a window were counted with its first part only.
    assert sum(window.requests for window in merged.header.windows) == 3 * 3


def test_what_stays_below_the_minimum_is_never_written(tokens: Tokens, tmp_path: Path) -> None:
    writer = patient(tmp_path / "statistics", minimum=121)
    writer.offer(statistics_of(tokens, NUM_EXPERTS))
    writer.close()
    assert not (tmp_path / "statistics").exists()
    assert writer.status().tokens_pending == 120
    assert withhold_small_slices(statistics_of(tokens, NUM_EXPERTS), 120)[1] is None


@pytest.mark.parametrize("directory", ["statistics", "no\0path"])
def test_a_loss_is_told_where_tokens_may_not_be(
    directory: str, tokens: Tokens, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    statistics = statistics_of(tokens, NUM_EXPERTS, slices=("tenant a",))
    window = statistics.header.windows[0].model_copy(update={"complete": False})
    writer = patient(tmp_path / directory, minimum=121)
    writer.offer(replace(statistics, header=statistics.header.model_copy(update={"windows": (window,)})))
    writer.close()
    if directory != "statistics":
        assert "could not be written" in caplog.text
        return
    told = merge_files([str(tmp_path / directory)])
    assert told.header.slices == ("default",)
    assert not told.header.complete
    assert not any(values.any() for values in told.fields_by_name().values())
    (window,) = told.header.windows
    assert (window.requests, window.prompt_tokens_total) == (0, 0)


def test_ranks_that_count_no_layers_tokens_are_written_too(tokens: Tokens, tmp_path: Path) -> None:
    # Two expert-parallel ranks: each has half of the experts, the first alone counts the tokens of the layers.
    whole = statistics_of(tokens, NUM_EXPERTS)
    for rank in range(2):
        statistics = statistics_of(tokens, NUM_EXPERTS, id_=f"w{rank}")
        for values in statistics.fields_by_name().values():
            if values.ndim == 4:
                values[..., slice(2, 4) if rank == 0 else slice(0, 2)] = 0
        if rank == 1:
            statistics.layer_token_count_SPL[:] = 0
        writer = patient(tmp_path, minimum=30)
        writer.offer(statistics)
        writer.close()
    merged = merge_files([str(tmp_path)])
    for name, values in whole.fields_by_name().items():
        assert np.array_equal(merged.fields_by_name()[name], values), name


def test_writes_through_fsspec(tokens: Tokens) -> None:
    writer = patient("memory://live")
    writer.offer(statistics_of(tokens, NUM_EXPERTS))
    writer.close()
    assert sum(merge_files(["memory://live"]).tokens_per_slice()) == 120


def test_old_partial_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".a.safetensors.x.partial", ".b.safetensors.y.partial", ".c"))
    for path in (old, young, other):
        path.touch()
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    patient(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name]


def test_an_offer_is_due_before_the_interval_ends(tmp_path: Path) -> None:
    writer = StatisticsWriter(str(tmp_path), interval_seconds=0.2)
    assert not writer.due
    wait_for(lambda: writer.due)
    writer.close()


def test_kill_9_leaves_whole_files_and_costs_at_most_an_interval() -> None:
    command = [sys.executable, str(ROOT / "bench" / "stats_kill.py"), "--kills", "3", "--interval-seconds", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    document = json.loads(ran.stdout)
    assert document["files"] > 0
    assert document["unreadable_files"] == 0
    assert document["worst_missing_ratio"] <= 1
