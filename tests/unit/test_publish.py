"""Outputs are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from reap_serve.errors import OutputExistsError, StorageError
from reap_serve.leftovers import remove_leftovers
from reap_serve.publish import new_directory, new_file, refuse_existing, refuse_existing_directory, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "plan.json", b"{}", overwrite=False)
    assert (tmp_path / "plan.json").read_bytes() == b"{}"
    assert names(tmp_path) == ["plan.json"]


def test_an_existing_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"old")
    with pytest.raises(OutputExistsError, match="exists already; give another path or --overwrite"):
        write_file(tmp_path / "plan.json", b"new", overwrite=False)
    assert (tmp_path / "plan.json").read_bytes() == b"old"
    write_file(tmp_path / "plan.json", b"new", overwrite=True)
    assert (tmp_path / "plan.json").read_bytes() == b"new"


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError):
        refuse_existing(tmp_path / "out", overwrite=False)


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be made"):
        refuse_existing(tmp_path / "file" / "sub" / "out", overwrite=False)


def test_a_directory_takes_its_name_only_when_it_is_finished(tmp_path: Path) -> None:
    with new_directory(tmp_path / "out", overwrite=False) as staging:
        (staging / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    # The marker tells a later --overwrite that the directory is ours to replace.
    assert names(tmp_path / "out") == [".reap-serve", "a"]


def test_a_failed_directory_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    (tmp_path / "out" / ".reap-serve").write_text("made by reap-serve 0.1.0")

    def fill() -> None:
        with new_directory(tmp_path / "out", overwrite=True) as staging:
            (staging / "new").write_text("2")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fill()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [".reap-serve", "old"]


def test_a_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_directory(tmp_path / "out", overwrite=True) as staging:
            (staging / name).write_text("1")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [".reap-serve", "new"]


REPORT = json.dumps({"schema_version": 1, "provenance": {"tool": "reap-serve 0.1.0"}})


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ({}, True),
        ({".reap-serve": "made by reap-serve"}, True),
        ({"reap_manifest.json": "{}", "config.json": "{}"}, True),
        ({"report.json": REPORT, "report.html": ""}, True),
        ({"thesis.tex": "years of work"}, False),
        ({"report.json": "{}"}, False),
        ({"report.json": "[" * 100_000}, False),
        ({"report.json": json.dumps({"provenance": "reap-serve"})}, False),
        ({"config.json": "{}", "model.safetensors": ""}, False),
    ],
)
def test_only_a_directory_of_ours_is_replaced(tmp_path: Path, content: dict[str, str], ours: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    if ours:
        refuse_existing_directory(out, overwrite=True)
        with new_directory(out, overwrite=True) as staging:
            (staging / "new").write_text("1")
        assert names(out) == [".reap-serve", "new"]
    else:
        with pytest.raises(OutputExistsError, match="nothing that tells it was made by reap-serve"):
            refuse_existing_directory(out, overwrite=True)
        assert {name: (out / name).read_text() for name in names(out)} == content
    assert names(tmp_path) == ["out"]


def test_a_directory_in_which_somebody_lives_or_works_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "homes" / "me", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir(parents=True)
        (folder / ".reap-serve").write_text("made by reap-serve")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for path in (home, home.parent, Path("."), work, Path(".."), tmp_path):
        with pytest.raises(OutputExistsError, match="or holds it"):
            refuse_existing_directory(path, overwrite=True)
    with pytest.raises(OutputExistsError):
        refuse_existing_directory(Path("/proc"), overwrite=True)


def test_files_and_directories_do_not_replace_each_other(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputExistsError, match="is a file, and the output is a directory"):
        refuse_existing_directory(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputExistsError, match="is a directory, and the output is a file"):
        write_file(tmp_path / "folder", b"", overwrite=True)
    assert names(tmp_path) == ["file", "folder"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("1")
    (tmp_path / "out").symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputExistsError, match="nothing that tells"):
        refuse_existing_directory(tmp_path / "out", overwrite=True)
    write_file(tmp_path / "out", b"2", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"2"
    assert (tmp_path / "theirs" / "file").read_text() == "1"


def test_a_full_device_is_written_to_and_says_no() -> None:
    before = os.stat("/dev/full")
    with pytest.raises(StorageError, match="No space left on device; free space"):
        write_file(Path("/dev/full"), b"x" * 100, overwrite=True)
    assert os.stat("/dev/full").st_ino == before.st_ino
    write_file(Path("/dev/null"), b"x" * 100, overwrite=False)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, b"content", overwrite=False)
    reader.join(10)
    assert received == [b"content"]
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_the_name_of_a_descriptor_is_written_to(tmp_path: Path, name: str) -> None:
    """Also where stdout is a file, which must not be replaced by another one, nor the name by a file."""
    code = (
        "import sys; from pathlib import Path; from reap_serve.publish import write_file\n"
        "print('before', flush=True); write_file(Path(sys.argv[1]), b'content\\n', overwrite=True); print('after')"
    )
    with open(tmp_path / "log", "wb") as log:
        subprocess.run([sys.executable, "-c", code, name], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\ncontent\nafter\n"
    assert os.path.islink("/dev/stdout") or not os.path.exists("/dev/stdout")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "its file system is read-only; give a path that can be written"),
        (errno.EACCES, "no permission; give a path that you may write"),
        (errno.ENOSPC, "No space left on device; free space or give another path"),
        (errno.EIO, "Input/output error; give a path that can be written"),
    ],
)
def test_the_reason_of_a_refusal_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(*arguments: object, **keywords: object) -> tuple[int, str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    for write in (
        lambda: write_file(tmp_path / "out", b"", overwrite=False),
        lambda: new_directory(tmp_path / "out", overwrite=False).__enter__(),
    ):
        with pytest.raises(StorageError, match=message):
            write()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="no permission"):
        refuse_existing_directory(tmp_path / "out", overwrite=False)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(StorageError, match="its file system is read-only"):
        refuse_existing(tmp_path / "out", overwrite=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from reap_serve import publish
kind, out = sys.argv[1], Path(sys.argv[2])
if kind == "file":
    with publish.new_file(out, overwrite=True) as handle:
        handle.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
if kind == "retired":
    rename = os.rename
    def once(source, target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = once
with publish.new_directory(out, overwrite=True) as staging:
    (staging / "half").write_text("1")
    if kind == "directory":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "directory", "retired"])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    out, neighbour = tmp_path / "out", tmp_path / "out.other"
    if kind == "retired":
        with new_directory(out, overwrite=False) as staging:
            (staging / "old").write_text("1")
    for path in (out, neighbour):
        command = [sys.executable, "-c", KILLED, "file" if path == neighbour else kind, str(path)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len([name for name in names(tmp_path) if name.startswith(".out.")]) >= 2
    if kind == "retired":
        # What was set aside and never replaced is there again.
        remove_leftovers(out)
        assert names(out) == [".reap-serve", "old"]
    with new_directory(out, overwrite=True) as staging:
        (staging / "new").write_text("1")
    assert names(out) == [".reap-serve", "new"]
    # The neighbour's leftover is another output's.
    (left,) = [name for name in names(tmp_path) if name.startswith(".")]
    assert left.startswith(".out.other.")


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    with new_file(tmp_path / "out", overwrite=False) as first:
        first.write(b"first")
        write_file(tmp_path / "out", b"second", overwrite=False)
    assert (tmp_path / "out").read_bytes() == b"first"
    with new_directory(tmp_path / "folder", overwrite=False) as outer:
        with new_directory(tmp_path / "folder", overwrite=False):
            pass
        assert outer.exists()
