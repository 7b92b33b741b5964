"""`reap-serve stats`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from token_rows import random_tokens, reap_standard_error, statistics_of

from reap_serve.cli.app import main
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.saliency import mix_slices, saliency

NUM_EXPERTS = 6


class Run:
    """Runs `reap-serve stats` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self._monkeypatch.setattr(sys, "argv", ["reap-serve", "stats", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of one model, of 60 and 40 tokens."""
    tokens = random_tokens(np.random.default_rng(0), 100, 2, NUM_EXPERTS, 2, num_slices=2)
    for index, part in enumerate((tokens[:60], tokens[60:])):
        statistics = statistics_of(part, NUM_EXPERTS, ("chat", "code"), f"w{index}")
        write_statistics(statistics, str(tmp_path / "parts" / f"{index}.safetensors"), overwrite=False)
    return tmp_path / "parts"


def test_show_prints_the_document_of_the_contract(run: Run, folder: Path) -> None:
    code, out, err = run("show", folder, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["criterion"] == "reap"
    assert document["slices"] == ["chat", "code"]
    assert document["complete"] is True
    assert (document["top_k"], document["num_experts"]) == (2, NUM_EXPERTS)
    assert document["model"]["architecture"] == "qwen3_moe"
    assert [layer["index"] for layer in document["layers"]] == [0, 1]
    for layer in document["layers"]:
        assert layer["layer"] == f"model.layers.{layer['index']}.mlp.experts"
        assert layer["layer_token_count"] == layer["token_count"] == 100
        experts = layer["experts"]
        assert sum(experts["token_count"]) == 2 * 100
        assert all(len(values) == NUM_EXPERTS for values in experts.values())
        np.testing.assert_allclose(
            experts["saliency"], np.divide(experts["weighted_norm_sum"], experts["token_count"]), rtol=1e-12
        )


def test_show_of_one_file_is_what_the_functions_say(run: Run, folder: Path) -> None:
    sums = mix_slices(read_statistics(str(folder / "0.safetensors")))
    document = json.loads(run("show", folder / "0.safetensors", "--json")[1])
    for row, layer in enumerate(document["layers"]):
        assert layer["experts"]["saliency"] == saliency(sums, "reap")[row].tolist()
        np.testing.assert_allclose(layer["experts"]["saliency_stderr"], reap_standard_error(sums)[row], rtol=1e-9)
    stability = document["stability"]
    assert stability["keep_experts"] == 3
    assert stability["tokens_seen"] == 60
    assert 0 < stability["flip_fraction"] < 1
    assert stability["tokens_needed"] > 60


def test_show_of_a_slice_counts_its_tokens_only(run: Run, folder: Path) -> None:
    whole = json.loads(run("show", folder, "--json")[1])
    parts = [json.loads(run("show", folder, "--slice", name, "--json")[1]) for name in ("chat", "code")]
    assert parts[0]["slices"] == ["chat"]
    assert sum(part["layers"][0]["layer_token_count"] for part in parts) == whole["layers"][0]["layer_token_count"]


def test_errors_that_are_not_known_are_null(run: Run, folder: Path) -> None:
    document = json.loads(run("show", folder, "--criterion", "msan", "--json")[1])
    assert document["layers"][0]["experts"]["saliency_stderr"] == [None] * NUM_EXPERTS
    assert document["stability"]["flip_fraction"] is None


def test_tables_name_layers_and_experts(run: Run, folder: Path) -> None:
    code, out, _ = run("show", folder)
    assert code == 0
    assert "chat" in out
    assert "decisions are expected to change" in out
    code, out, _ = run("show", folder, "--layer", 1)
    assert code == 0
    assert "model.layers.1.mlp.experts" in out
    assert run("show", folder, "--layer", 7)[0] == 2


def test_merge_writes_the_sum_once(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.safetensors"
    code, out, _ = run("merge", *sorted(folder.iterdir()), "--output", output, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] == 100
    assert sum(read_statistics(str(output)).tokens_per_slice()) == 100
    code, out, err = run("merge", folder, "--output", output)
    assert (code, out) == (2, "")
    assert "exists already" in err
    code, _, err = run("merge", output, folder / "0.safetensors", "--output", tmp_path / "twice")
    assert code == 2
    assert "window w0" in err
    assert not (tmp_path / "twice").exists()
    assert run("merge", folder, "--output", output, "--overwrite")[0] == 0


def test_diff_of_files_and_slices(run: Run, folder: Path) -> None:
    left, right = folder / "0.safetensors", folder / "1.safetensors"
    document = json.loads(run("diff", left, right, "--keep-experts", 2, "--json")[1])
    assert document["keep_experts"] == 2
    assert [layer["index"] for layer in document["layers"]] == [0, 1]
    assert -1 <= document["spearman_mean"] <= 1
    same = json.loads(run("diff", left, left, "--json")[1])
    assert same["spearman_mean"] == pytest.approx(1)
    assert same["kept_overlap_mean"] == 1
    code, out, _ = run("diff", left, left, "--slice-a", "chat", "--slice-b", "code")
    assert code == 0
    assert "spearman" in out


def test_exports_are_written_whole_or_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    assert run("export", folder, "--format", "llm-compressor", "--output", output)[0] == 2
    assert not output.exists()
    assert run("export", folder, "--format", "llm-compressor", "--keep-experts", 2, "--output", output)[0] == 0
    assert {len(ids) for ids in json.loads(output.read_text()).values()} == {2}
    assert run("export", folder, "--format", "reap", "--output", tmp_path / "observer.pt")[0] == 0
    assert (tmp_path / "observer.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{missing}"], "does not exist"),
        (["show", "{folder}", "--criterion", "reep"], "no criterion reep"),
        (["show", "{folder}", "--slice", "prose"], "no slice prose"),
        (["show", "{folder}", "--keep-experts", "9"], "cannot keep 9 of 6"),
        (["show", "{text}"], "corrupt"),
        (["show", "{empty}"], "holds no"),
        (["diff", "{folder}", "{missing}"], "does not exist"),
        (["show"], "Missing argument"),
    ],
)
def test_wrong_requests_give_one_line_and_exit_2(
    run: Run, folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text").write_text("no statistics")
    (tmp_path / "empty").mkdir()
    places = {name: str(tmp_path / name) for name in ("missing", "text", "empty")} | {"folder": str(folder)}
    code, out, err = run(*(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_help_loads_neither_numpy_nor_torch() -> None:
    program = "import sys, reap_serve.cli.stats; print(sorted({'numpy', 'torch', 'safetensors'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_merge_spares_what_it_reads_and_files_of_others(run: Run, folder: Path, tmp_path: Path) -> None:
    held = sorted(folder.glob("*.safetensors"))[0]
    content = held.read_bytes()
    code, _, err = run("merge", folder, "-o", held, "--overwrite")
    assert (code, f"the output {held} is read by this command" in err) == (2, True)
    assert held.read_bytes() == content
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    code, _, err = run("merge", folder, "-o", plan, "--overwrite")
    assert (code, "plan.json is not a statistics file" in err) == (2, True)
    for _ in range(2):
        assert run("merge", folder, "-o", tmp_path / "sum.safetensors", "--overwrite")[0] == 0


def test_a_directory_is_read_by_both_endings_and_by_content(run: Run, folder: Path) -> None:
    (folder / "0.safetensors").rename(folder / "monday.stats")
    (folder / "1.safetensors").rename(folder / "tuesday")
    (folder / "notes.txt").write_text("not read")
    code, out, err = run("show", folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["layers"][0]["token_count"] == 100
    (folder / "tuesday").rename(folder / "1.safetensors")
    code, out, _ = run("show", folder, "--json")
    assert (code, json.loads(out)["layers"][0]["token_count"]) == (0, 100)
    for name in ("monday.stats", "1.safetensors"):
        (folder / name).unlink()
    (folder / "week.stats.gz").write_bytes(b"\x1f\x8b")
    code, _, err = run("show", folder)
    assert (code, "holds no statistics file" in err, "passed over: week.stats.gz" in err) == (2, True, True)
