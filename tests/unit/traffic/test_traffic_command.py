"""`reap-serve traffic` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reap_serve.cli import app as program

FIXTURES = Path(__file__).parent / "fixtures"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["reap-serve", *arguments])
    with pytest.raises(SystemExit) as ended:
        program.main()
    printed = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), printed.out, printed.err


def test_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(FIXTURES / name) for name in ("openai_batch.jsonl", "litellm.jsonl", "azure.csv")]
    code, out, _ = run(monkeypatch, capsys, "traffic", "show", *files, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["requests"], found["length_only"], found["sessions"]) == (9, 3, 2)
    assert found["formats"] == {"openai-batch": 4, "litellm": 3, "azure": 2}
    assert found["token_unit"] == "characters/4"
    assert set(found["slices"]) == {"chat", "default", "support"}
    code, out, _ = run(monkeypatch, capsys, "traffic", "show", *files)
    assert code == 0
    assert "9 requests (3 of lengths only)" in out


def test_convert_then_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    batch, sample = tmp_path / "batch.jsonl", tmp_path / "sample.jsonl"
    code, out, _ = run(
        monkeypatch, capsys, "traffic", "convert", str(FIXTURES / "sharegpt.json"), "-o", str(batch), "--model", "m"
    )
    assert (code, out) == (0, f"3 requests written to {batch}\n")
    assert {json.loads(line)["body"]["model"] for line in batch.read_text().splitlines()} == {"m"}
    code, out, _ = run(
        monkeypatch, capsys, "traffic", "sample", str(batch), "--tokens", "1", "-o", str(sample), "--json"
    )
    assert (code, json.loads(out)["requests"]) == (0, 1)
    assert len(sample.read_text().splitlines()) == 1


def test_refusals_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    azure = str(FIXTURES / "azure.csv")
    code, _, err = run(monkeypatch, capsys, "traffic", "convert", azure, "-o", str(target))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes((FIXTURES / "requests.jsonl").read_bytes() + b"{broken\n")
    code, _, err = run(monkeypatch, capsys, "traffic", "convert", str(bad), "-o", str(target))
    assert (code, "bad.jsonl:4: not JSON" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    code, out, _ = run(
        monkeypatch, capsys, "traffic", "convert", str(bad), "-o", str(target), "--skip-malformed", "--json"
    )
    assert (code, json.loads(out)["malformed"]) == (0, {"not JSON": 1})
    code, _, err = run(monkeypatch, capsys, "traffic", "convert", str(bad), "-o", str(target), "--skip-malformed")
    assert (code, "exists already" in err) == (2, True)


@pytest.mark.parametrize("name", ["convert", "sample"])
def test_overwrite_spares_the_traffic_that_is_read_and_files_of_others(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    traffic, notes, batch = tmp_path / "sg.json", tmp_path / "notes.txt", tmp_path / "batch.jsonl"
    traffic.write_bytes((FIXTURES / "sharegpt.json").read_bytes())
    notes.write_text("keep me\n")
    arguments = ["--overwrite", *(["--tokens", "1"] if name == "sample" else [])]
    for given in ([str(traffic)], ["--slice", f"chat={traffic}"]):
        code, _, err = run(monkeypatch, capsys, "traffic", name, *given, "-o", str(traffic), *arguments)
        assert (code, err) == (2, f"error: the output {traffic} is read by this command; give another path\n")
    code, _, err = run(monkeypatch, capsys, "traffic", name, str(traffic), "-o", str(notes), *arguments)
    assert code == 2
    assert "notes.txt is not a file of OpenAI Batch lines" in err
    assert traffic.read_bytes() == (FIXTURES / "sharegpt.json").read_bytes()
    assert notes.read_text() == "keep me\n"
    for _ in range(2):
        assert run(monkeypatch, capsys, "traffic", name, str(traffic), "-o", str(batch), *arguments)[0] == 0


def test_every_converted_line_has_an_id_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = []
    for index, record_id in enumerate((None, None, "a", "a", None)):
        record = {"body": {"messages": [{"role": "user", "content": str(index)}]}, "url": "/v1/chat/completions"}
        files.append(tmp_path / f"{index}.jsonl")
        files[-1].write_text(json.dumps(record | ({} if record_id is None else {"custom_id": record_id})) + "\n")
    output = tmp_path / "out.jsonl"
    code, _, err = run(monkeypatch, capsys, "traffic", "convert", *map(str, files), "-o", str(output))
    assert (code, err) == (0, "")
    ids = [json.loads(line)["custom_id"] for line in output.read_text().splitlines()]
    assert ids == ["1", "2", "a", "4", "5"]


def test_what_stands_in_an_array_has_its_line_and_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "arr.json"
    for text, place in (
        ("[1,2,3]\n", "1: not a JSON object"),
        ("\n[\n1\n]\n", "3: not a JSON object"),
        ("[\nnope]\n", "2: not JSON"),
    ):
        path.write_text(text)
        code, _, err = run(monkeypatch, capsys, "traffic", "show", str(path))
        assert (code, f"arr.json:{place};" in err) == (2, True)


def test_a_file_given_twice_is_read_once_and_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    azure, slice_of = str(FIXTURES / "azure.csv"), f"chat={FIXTURES / 'azure.csv'}"
    code, out, err = run(monkeypatch, capsys, "traffic", "show", azure, azure, "--json")
    assert (code, json.loads(out)["requests"]) == (0, 2)
    assert f"note: {azure} is given 2 times and read once" in err
    _, _, err = run(monkeypatch, capsys, "traffic", "show", azure, "--slice", slice_of, "--json")
    assert "times" not in err


@pytest.mark.parametrize("name", ["/dev/stdout", "-"])
def test_nothing_stands_behind_data_on_stdout(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reap_serve", "traffic", "convert", str(FIXTURES / "sharegpt.json"), "-o", name]
    for options, said in ((), "3 requests written to"), (("--json",), '"requests": 3'):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert [json.loads(line)["method"] for line in done.stdout.splitlines()] == ["POST"] * 3
        assert said in done.stderr
    assert not list(tmp_path.iterdir())
