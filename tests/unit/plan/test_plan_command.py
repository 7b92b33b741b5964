"""The command line: what it writes, prints and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from statistics_of import random_statistics

from reap_serve.cli.app import main
from reap_serve.plan.record import read_plan
from reap_serve.statistics.file import write_statistics


class Run:
    """Runs `reap-serve` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self._monkeypatch.setattr(sys, "argv", ["reap-serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self._capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    path = tmp_path / "stats.safetensors"
    write_statistics(random_statistics(2, 3, 16), str(path), overwrite=False)
    return path


def test_a_plan_is_written_and_printed(run: Run, stats: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    code, out, _ = run("plan", stats, "--keep-fraction", 0.5, "--output", output, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed.pop("output") == str(output)
    assert printed == read_plan(output).model_dump(mode="json")
    assert [len(layer["kept"]) for layer in printed["layers"]] == [8, 8, 8]


def test_the_order_of_the_arguments_changes_nothing(run: Run, tmp_path: Path) -> None:
    paths = []
    for number in range(3):
        statistics = random_statistics(2, 3, 16, seed=number)
        window = statistics.header.windows[0].model_copy(update={"id": f"w{number}"})
        header = statistics.header.model_copy(update={"windows": (window,)})
        path = tmp_path / f"{number}.safetensors"
        write_statistics(
            type(statistics)(header, statistics.sums, statistics.layer_token_count_SPL), str(path), overwrite=False
        )
        paths.append(path)
    plans = []
    for order in (paths, paths[::-1]):
        run("plan", *order, "--keep-fraction", 0.5, "--output", tmp_path / "plan.json", "--overwrite")
        plan = read_plan(tmp_path / "plan.json")
        plans.append((plan.layers, plan.summary, plan.provenance["windows"]))
    assert plans[0] == plans[1]
    assert plans[0][2] == ["w0", "w1", "w2"]


def test_options_may_come_first_and_a_file_may_be_called_show(
    run: Run, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stats.rename("show")
    assert run("plan", "--keep-experts", 8, "--output", "plan.json", "./show")[0] == 0
    assert run("plan", "show", "plan.json")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-experts", 1], "keeps 1 of 16 experts per layer, but it must be at least 2"),
        (["--keep-fraction", 0], "--keep-fraction is 0.0; give the fraction to keep, above 0 and at most 1"),
        (["--keep-experts", 17], "keeps 17 of 16 experts per layer"),
        (["--keep-experts", 9, "--multiple-of", 4], "a multiple of 4 (--multiple-of); keep 8 or 12 experts"),
        ([], "give exactly one"),
        (["--keep-experts", 8, "--mix", "slice0=x"], "write --mix code=0.7,chat=0.3"),
        (["--keep-experts", 8, "--mix", "nobody=1"], "no slice nobody"),
        (["--keep-experts", 8, "--criterion", "raep"], "no criterion raep"),
        (["--target-bytes", 100], "add --model MODEL"),
        (["--sweep", "0.5"], "--sweep writes no plan"),
        (["--keep-experts", "x"], "see reap-serve plan --help"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    run: Run, stats: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    output = tmp_path / "plan.json"
    code, out, err = run("plan", stats, *options, "--output", output)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not output.exists()


def test_an_existing_plan_is_refused_before_any_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    code, _, err = run("plan", tmp_path / "missing", "--keep-experts", 2, "--output", tmp_path / "plan.json")
    assert code == 2
    assert "exists already" in err
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_without_an_output_nothing_is_planned(run: Run, stats: Path) -> None:
    code, _, err = run("plan", stats, "--keep-experts", 8)
    assert code == 2
    assert "--output is missing" in err


def test_a_sweep_prints_a_row_a_fraction(run: Run, stats: Path) -> None:
    code, out, _ = run("plan", stats, "--sweep", "0.05,0.25,0.5", "--json")
    document = json.loads(out)
    assert code == 0
    assert [row["keep_experts"] for row in document["rows"]] == [None, 4, 8]
    assert "at least 2" in document["rows"][0]["refused"]
    code, out, err = run("plan", stats, "--sweep", "0.05,0.25,0.5")
    assert "8/16" in out
    assert "at least 2" in err


def test_plans_are_shown_compared_and_drawn(run: Run, stats: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    run("plan", stats, "--keep-experts", 8, "--output", a)
    run("plan", stats, "--keep-experts", 8, "--criterion", "random", "--output", b)
    code, out, _ = run("plan", "show", a)
    assert code == 0
    assert "8 of 16 experts in each of 3 layers, by reap" in out
    assert json.loads(run("plan", "show", a, "--json")[1])["criterion"] == "reap"
    same = json.loads(run("plan", "diff", a, a, "--json")[1])
    assert (same["changed_fraction"], same["overlap"]) == (0, 1)
    document = json.loads(run("plan", "diff", a, b, "--json")[1])
    kept_a, kept_b = ([set(layer.kept) for layer in read_plan(path).layers] for path in (a, b))
    assert [set(layer["only_a"]) for layer in document["layers"]] == [
        x - y for x, y in zip(kept_a, kept_b, strict=True)
    ]
    assert document["changed_fraction"] == sum(len(x ^ y) for x, y in zip(kept_a, kept_b, strict=True)) / 48
    assert run("plan", "diff", a, b)[0] == 0
    svg = tmp_path / "plan.svg"
    assert run("plan", "plot", a, "--output", svg)[0] == 0
    texts = [element.text for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"kept", "dropped", "slice0", "slice1", "mixture"} <= set(texts)


def test_a_plan_written_by_hand_is_shown_and_drawn(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "hand.json"
    layer = {"layer": "x", "index": 0, "kept": [0, 2], "dropped": [1, 3]}
    plan.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "mine", "layers": [layer]}))
    code, out, _ = run("plan", "show", plan)
    assert code == 0
    assert "2 of 4 experts in each of 1 layers, by mine" in out
    assert run("plan", "plot", plan, "--output", tmp_path / "hand.svg")[0] == 0


def test_plans_of_different_models_are_not_compared(run: Run, stats: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_statistics(random_statistics(1, 3, 8), str(other), overwrite=False)
    for path, name in ((stats, "a.json"), (other, "b.json")):
        run("plan", path, "--keep-experts", 4, "--output", tmp_path / name)
    code, _, err = run("plan", "diff", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 2
    assert "num_experts is 16 against 8" in err


def imported_by(*statements: str) -> set[str]:
    """Top-level modules that a fresh interpreter has imported after some statements."""
    program = "; ".join(("import sys", *statements, "print(' '.join(name for name in sys.modules if '.' not in name))"))
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_planning_needs_neither_torch_nor_vllm_and_help_not_even_numpy() -> None:
    planner = imported_by(
        "import reap_serve.plan.sweep, reap_serve.plan.planner, reap_serve.plan.model_limits, reap_serve.plan.figure"
    )
    assert "numpy" in planner
    assert not planner & {"torch", "vllm", "transformers"}
    command = imported_by("import reap_serve.cli.plan, reap_serve.cli.plan_read")
    assert not command & {"numpy", "torch", "vllm", "safetensors", "pydantic"}


def test_names_from_requests_are_printed_as_text(run: Run, tmp_path: Path) -> None:
    """Slices that strangers named in markup, and a file named in control characters."""
    statistics = random_statistics(2, 3, 16)
    header = statistics.header.model_copy(update={"slices": ("[/x]", "a[red]b")})
    hostile = tmp_path / "\x1b[31mstats"
    write_statistics(
        type(statistics)(header, statistics.sums, statistics.layer_token_count_SPL), str(hostile), overwrite=False
    )
    plan, svg = tmp_path / "\x1b[32mplan.json", tmp_path / "plan.svg"
    for words in (
        ("stats", "show", hostile),
        ("stats", "show", hostile, "--layer", 1),
        ("stats", "show", hostile, "--slice", "[/x]"),
        ("plan", hostile, "--keep-fraction", 0.5, "--output", plan),
        ("plan", hostile, "--sweep", "0.25,0.5"),
        ("plan", "show", plan),
        ("plan", "plot", plan, "--output", svg),
    ):
        code, out, err = run(*words)
        assert code == 0, err
        assert (out + err).replace("\n", "").isprintable(), words
        if words[:2] in (("plan", hostile), ("plan", "show")) or words[1:] == ("show", hostile):
            assert "[/x]" in out, words
            assert "a[red]b" in out, words
    code, out, err = run("plan", hostile, "--keep-fraction", 0.5, "--output", plan)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "\\x1b[32mplan.json exists already" in err


def test_overwrite_spares_the_statistics_that_are_read_and_files_of_others(
    run: Run, stats: Path, tmp_path: Path
) -> None:
    read = stats.read_bytes()
    traffic = tmp_path / "code.jsonl"
    traffic.write_text('{"prompt": "p"}\n')
    link = tmp_path / "link.json"
    link.symlink_to(stats)
    for output, why in (
        (stats, "is read by this command"),
        (link, f"is {stats}, an input of this command"),
        (traffic, "is not a plan, and --overwrite replaces only what this command writes"),
    ):
        code, out, err = run("plan", stats, "--keep-fraction", 0.5, "--output", output, "--overwrite")
        assert (code, out) == (2, "")
        assert why in err
        assert err.count("\n") == 1
    assert stats.read_bytes() == read
    assert traffic.read_text() == '{"prompt": "p"}\n'
    for _ in range(2):
        code, _, _ = run("plan", stats, "--keep-fraction", 0.5, "--output", tmp_path / "plan.json", "--overwrite")
        assert code == 0
    code, _, err = run(
        *("plan", "restore", tmp_path / "plan.json", stats, "--experts", 1, "-o", tmp_path / "plan.json", "--overwrite")
    )
    assert (code, "is read by this command" in err) == (2, True)
