"""What `--overwrite` leaves alone: the command's own inputs, and files of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from reap_serve import file_kinds as kinds
from reap_serve.errors import OutputExistsError
from reap_serve.overwriting import is_stdout
from reap_serve.publish import refuse_existing, refuse_existing_directory

PLAN = json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": []}).encode()
STATISTICS = save({"a": np.zeros(1)}, {"format": "reap_serve.statistics"})
LINE = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
BATCH = json.dumps(LINE).encode() + b"\n{broken\n"
OF_KIND = [
    (kinds.PLAN, PLAN),
    (kinds.STATISTICS, STATISTICS),
    (kinds.BATCH, BATCH),
    (kinds.EXPERT_LISTS, b'{"model.layers.0.mlp": [0, 1]}'),
    (kinds.REPLAY_REPORT, b'{"version": "0.2.1", "run": {}, "scenario": {}, "results": {}}'),
]
FOREIGN = [
    b"notes",
    b"[1]",
    b'{"messages": []}\n',
    b"\xff" * 32,
    save({"a": np.zeros(1)}, {"format": "pt"}),
    b"[" * 9999,
]


@pytest.mark.parametrize(("kind", "content"), OF_KIND)
def test_a_file_of_the_kind_is_replaced(kind: kinds.FileKind, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out"
    for held in (content, b""):
        path.write_bytes(held)
        refuse_existing(path, True, kind)


@pytest.mark.parametrize("kind", [kind for kind, _ in OF_KIND] + [kinds.PICTURE, kinds.SUBSPACE, kinds.OBSERVER_STATE])
def test_a_file_of_another_kind_is_kept(kind: kinds.FileKind, tmp_path: Path) -> None:
    path = tmp_path / "out"
    for content in [*FOREIGN, *(content for other, content in OF_KIND if other is not kind)]:
        path.write_bytes(content)
        with pytest.raises(OutputExistsError, match=f"out is not {kind.name}, and --overwrite replaces only"):
            refuse_existing(path, True, kind)


def test_an_input_is_no_output_by_any_of_its_names(tmp_path: Path) -> None:
    source = tmp_path / "week.stats"
    source.write_bytes(STATISTICS)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    for output in (source, tmp_path / "link", tmp_path / "hard", tmp_path / ".." / tmp_path.name / "week.stats"):
        for overwrite in (True, False):
            with pytest.raises(OutputExistsError, match="this command; give another path"):
                refuse_existing(output, overwrite, kinds.STATISTICS, ["org/model", "-", str(source)])
    refuse_existing(tmp_path / "new", True, kinds.STATISTICS, [str(source)])
    assert source.read_bytes() == STATISTICS


def test_a_directory_with_an_input_in_it_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.json").write_text('{"provenance": {"tool": "reap-serve 0"}}')
    refuse_existing_directory(output, True, [tmp_path / "traffic.jsonl"])
    (output / "traffic.jsonl").write_bytes(BATCH)
    for given in (output, output / "traffic.jsonl"):
        with pytest.raises(OutputExistsError, match="this command"):
            refuse_existing_directory(output, True, [given])


def test_a_dash_is_stdout_and_no_directory() -> None:
    assert is_stdout(Path("-"))
    refuse_existing(Path("-"), False, kinds.PLAN)
    for name in ("-", "/dev/stdout"):
        with pytest.raises(OutputExistsError, match="is a stream, and the output is a directory"):
            refuse_existing_directory(Path(name), True)
