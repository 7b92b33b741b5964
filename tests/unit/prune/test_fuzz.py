"""Any damage to any file of a checkpoint: a sound result or one of our errors, and nothing outside OUTPUT."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoint import write_checkpoint, write_plan

from reap_serve.errors import RequestError
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)
FILES = (
    "source/config.json",
    "source/model.safetensors.index.json",
    "source/model-00001-of-00002.safetensors",
    "source/model-00002-of-00002.safetensors",
    "plan.json",
)
PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            b"null",
            b"[]",
            b"{}",
            b"-1",
            b"1e999",
            b"NaN",
            b"true",
            b'"..',
            b'"/',
            b"1152921504606846976",
            b"\\u0000",
            b"[" * 50,
        ]
    ),
)


@given(file=st.sampled_from(FILES), position=st.floats(0, 1), removed=st.integers(0, 40), inserted=PIECES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_checkpoints(file: str, position: float, removed: int, inserted: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_checkpoint(home / "source")
        write_plan(home / "plan.json", {0: [1, 3], 1: [0, 2]})
        content = (home / file).read_bytes()
        start = int(position * len(content))
        (home / file).write_bytes(content[:start] + inserted + content[start + removed :])
        before = sorted(home.rglob("*"))
        try:
            prune(str(home / "source"), home / "plan.json", home / "out", OPTIONS, overwrite=False)
        except RequestError:
            assert sorted(home.rglob("*")) == before
            return
        assert [path for path in sorted(home.rglob("*")) if not path.is_relative_to(home / "out")] == before
        assert verify(home / "out", str(home / "source"), None).sound


def test_the_undamaged_one_passes(tmp_path: Path) -> None:
    """So that the test above is not empty."""
    source = write_checkpoint(tmp_path / "source")
    plan = write_plan(tmp_path / "plan.json", {0: [1, 3], 1: [0, 2]})
    prune(str(source), plan, tmp_path / "out", OPTIONS, overwrite=False)
    assert verify(tmp_path / "out", str(source), None).sound
    with pytest.raises(RequestError):
        prune(str(source), tmp_path / "source" / "config.json", tmp_path / "other", OPTIONS, overwrite=False)
