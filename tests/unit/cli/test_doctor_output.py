"""What `doctor` shows of the engines that it starts: nothing, the file of their log, or all. They are played."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

PLAYED = """
import os, sys
from reap_serve.adapter import doctor
from reap_serve.errors import EngineError

def examine(advance=lambda what: None):
    advance("engine")
    print("INFO of the engine")
    print("Traceback of the engine", file=sys.stderr)
    os.write(2, b"a kernel's own line\\n")
    if {fails}:
        raise EngineError("vLLM failed: x", "see the log above, or add --debug")
    return doctor.Examination(ok={ok}, versions={{}}, seam_problems=(), device="cpu", defects=(), self_tests=())

doctor.examine = examine
sys.argv = ["reap-serve", "doctor", *{options}]
import reap_serve.__main__
"""
LOGGED = ["INFO of the engine", "Traceback of the engine", "a kernel's own line"]


def doctor(folder: Path, *options: str, ok: bool = True, fails: bool = False) -> subprocess.CompletedProcess[str]:
    program = PLAYED.format(ok=ok, fails=fails, options=list(options))
    command = [sys.executable, "-c", program]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_where_all_is_well_nothing_of_the_engines_is_shown(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_where_something_is_wrong_the_log_is_kept_and_named(fails: bool, tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json", ok=False, fails=fails)
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    named = re.fullmatch(r"what the engines logged is in (\S+); --verbose shows it", first)
    assert named is not None
    assert sorted(Path(named[1]).read_text().splitlines()) == sorted(LOGGED)
    assert rest == (["error: vLLM failed: x; see the log above, or add --debug"] if fails else [])


def test_verbose_shows_the_log_on_stderr(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json", "--verbose")
    assert json.loads(done.stdout)["ok"]
    assert sorted(done.stderr.splitlines()) == sorted(LOGGED)
