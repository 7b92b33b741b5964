"""Statistics by age: durations, and files chosen by the end of their windows."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from token_rows import random_tokens, statistics_of

from reap_serve.errors import RequestError
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.windows import ended, parse_duration, require_any, select_since

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)


def write_window(directory: Path, name: str, moment: datetime) -> str:
    statistics = statistics_of(random_tokens(np.random.default_rng(0), 20, 2, 4, 2), 4, id_=name)
    window = statistics.header.windows[0].model_copy(update={"ended": moment.isoformat()})
    header = statistics.header.model_copy(update={"windows": (window,)})
    path = str(directory / f"{name}.safetensors")
    write_statistics(type(statistics)(header, statistics.sums, statistics.layer_token_count_SPL), path, overwrite=False)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("1.5h", timedelta(minutes=90)),
        ("7d", timedelta(days=7)),
        ("2w", timedelta(weeks=2)),
        (" 5 m", timedelta(minutes=5)),
    ],
)
def test_durations(text: str, expected: timedelta) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "0h", "7y", "9" * 400 + "d", "nan d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is no duration"):
        parse_duration(text)


def test_files_are_chosen_by_the_end_of_their_last_window(tmp_path: Path) -> None:
    old = write_window(tmp_path, "old", NOW - timedelta(days=8))
    edge = write_window(tmp_path, "edge", NOW - timedelta(days=7))
    new = write_window(tmp_path, "new", NOW - timedelta(days=6, hours=23))
    chosen = select_since([old, edge, new], "7d", NOW)
    assert chosen.paths == (new,)
    assert chosen.older == (old, edge)
    with pytest.raises(RequestError, match="all 1 statistics files ended more than 7d ago"):
        require_any(select_since([old], "7d", NOW), "7d")


def test_a_time_in_another_zone_is_the_same_moment(tmp_path: Path) -> None:
    statistics = statistics_of(random_tokens(np.random.default_rng(0), 20, 2, 4, 2), 4)
    (window,) = statistics.header.windows
    assert ended(window.model_copy(update={"ended": "2026-03-10T14:00:00+02:00"})) == NOW
    assert ended(window.model_copy(update={"ended": "2026-03-10T12:00:00"})) == NOW
    with pytest.raises(RequestError, match="which is no time"):
        ended(window.model_copy(update={"ended": "yesterday"}))


def test_merge_and_drift_take_the_files_since_then(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    stats = tmp_path / "stats"
    stats.mkdir()
    write_window(stats, "old", now - timedelta(days=30))
    write_window(stats, "new", now - timedelta(days=1))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reap_serve", "stats", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    output = tmp_path / "week.safetensors"
    done = run("merge", str(stats), "--since", "7d", "--output", str(output), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == 1
    assert json.loads(done.stdout)["files_older"] == 1
    assert [window.id for window in read_statistics(str(output)).header.windows] == ["new"]
    drift = run("drift", str(output), str(stats), "--since", "7d", "--json")
    assert drift.returncode == 0, drift.stderr
    assert json.loads(drift.stdout)["plan_would_change"] is False
    assert "differs by no more than chance" in run("drift", str(output), str(output)).stdout
    late = run("merge", str(stats), "--since", "1s", "--output", str(tmp_path / "x"))
    assert late.returncode == 2
    assert late.stderr.startswith("error: all 2 statistics files ended more than 1s ago;")
