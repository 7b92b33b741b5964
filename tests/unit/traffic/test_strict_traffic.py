"""`observe` warns of what the receipt shows, and with `--strict-traffic` writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from test_traffic_command import run
from traffic_records import ASSISTANT, USER, batch

import reap_serve.adapter.offline
import reap_serve.demo
import reap_serve.statistics.file
import reap_serve.traffic.tokens
from reap_serve.errors import TrafficError
from reap_serve.traffic.receipt import ReceiptTally
from reap_serve.traffic.refusal import RefusedRecordError
from reap_serve.traffic.request import Origin, Request
from reap_serve.traffic.strict import require_stated_counts
from reap_serve.traffic.tokens import Length

MODEL = Path(reap_serve.demo.__file__).parent / "tiny_moe" / "model"


class Agreeing:
    """A tokenizer that agrees with the log."""

    estimated = False

    def __init__(self, model: str) -> None:
        self.unit = f"tokens of {model}"

    def __call__(self, request: Request) -> Length:
        return Length(100, 4)


class Done:
    """What an engine would have done with requests whose prompts it rendered to so many tokens."""

    too_long = unanswered = 0
    statistics = None
    seconds = 1.0

    def __init__(self, requests: object, rendered: int, refusals: object) -> None:
        tally = ReceiptTally("tokens of m")
        self.requests = 0
        for request in requests:  # type: ignore[attr-defined]
            if request.id == "refused":
                refusals.refuse(request, RefusedRecordError("no images"))  # type: ignore[attr-defined]
                continue
            tally.add(request, rendered, 4)
            self.requests += 1
        self.tokens = rendered * self.requests
        self.receipt = tally.receipt()


@pytest.fixture
def traffic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    line = batch([USER], ASSISTANT)
    line["response"]["body"]["usage"] = {"prompt_tokens": 100, "completion_tokens": 4}  # type: ignore[index]
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (line, {**line, "custom_id": "refused"}, line)))
    monkeypatch.setattr(
        reap_serve.statistics.file, "write_statistics", lambda statistics, path, overwrite: Path(path).touch()
    )
    return path


@pytest.mark.parametrize(("rendered", "strict", "code"), [(100, True, 0), (10, True, 2), (10, False, 0)])
def test_strict(
    rendered: int,
    strict: bool,
    code: int,
    traffic: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        reap_serve.adapter.offline,
        "observe_traffic",
        lambda source, requests, settings, arguments, on_progress, refusals: Done(requests, rendered, refusals),
    )
    # The tokenizer alone agrees with the log: the engine's own counts decide.
    monkeypatch.setattr(reap_serve.traffic.tokens, "token_counter", Agreeing)
    output = traffic.with_name("stats")
    options = ["--skip-malformed", "--json", *(["--strict-traffic"] if strict else [])]
    found, out, err = run(monkeypatch, capsys, "observe", str(MODEL), str(traffic), "--output", str(output), *options)
    assert found == code
    assert output.exists() == (code == 0)
    said = "the log states 200 prompt tokens and 20 were rendered, record by record 90.0% apart"
    assert (said in err) == (rendered == 10)
    if code:
        assert err.startswith("error: ")
        return
    assert "1 records were skipped: 1 refused by the engine: no images" in err
    receipt = json.loads(out)["receipt"]["files"][str(traffic)]
    assert receipt["slices"]["default"]["prompt_tokens_rendered"] == 2 * rendered
    assert (json.loads(out)["malformed"], len(receipt["differences"])) == (1, 2 * (rendered == 10))


def test_without_skipping_a_refused_record_stops(
    traffic: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        reap_serve.adapter.offline,
        "observe_traffic",
        lambda source, requests, settings, arguments, on_progress, refusals: Done(requests, 100, refusals),
    )
    output = traffic.with_name("stats")
    code, _, err = run(monkeypatch, capsys, "observe", str(MODEL), str(traffic), "--output", str(output))
    assert (code, output.exists()) == (2, False)
    assert f"error: {traffic}:2: refused by the engine: no images; " in err


@pytest.mark.parametrize(
    ("options", "started"),
    [([], False), (["--max-model-len", "8"], True), (["--engine-args", '{"tokenizer": "x"}'], True)],
)
def test_strict_refuses_before_an_engine_where_the_tokenizer_tells(
    options: list[str],
    started: bool,
    traffic: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The log states 100 tokens of prompts of less than 30; longer ones and other tokenizers are the engine's."""
    engines = []

    def observe(
        source: object, requests: object, settings: object, arguments: object, on_progress: object, refusals: object
    ) -> Done:
        engines.append(source)
        return Done(requests, 100, refusals)

    monkeypatch.setattr(reap_serve.adapter.offline, "observe_traffic", observe)
    output = str(traffic.with_name("stats"))
    command = ("observe", str(MODEL), str(traffic), "--output", output, "--skip-malformed", "--strict-traffic")
    code, _, err = run(monkeypatch, capsys, *command, *options)
    assert (code, bool(engines)) == ((0, True) if started else (2, False))
    assert ("the log states 300 prompt tokens" in err) != started


def test_what_only_an_engine_can_count_is_left_to_it() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    contents = ("Which?", [{"type": "text", "text": "Which?"}], [image, {"type": "text", "text": "Which?"}])
    counted = [
        Request(
            {"messages": [{"role": "user", "content": content}]},
            "chat",
            "s",
            Origin("f", "requests", 1),
            prompt_tokens=999,
        )
        for content in contents
    ]
    counter = Agreeing("m")
    assert require_stated_counts(counted[2:], counter, None) == 1
    assert require_stated_counts(counted[:2], counter, 50) == 2
    for request in counted[:2]:
        with pytest.raises(TrafficError, match="states 999 prompt tokens and 100 were rendered"):
            require_stated_counts([request], counter, None)
