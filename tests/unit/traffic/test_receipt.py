"""The receipt: what a log states against what was rendered, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from traffic_records import ASSISTANT, CALL, CHAT_TOOL, USER, batch, read_records

from reap_serve.traffic.receipt import MAX_NAMED, ReceiptTally, SliceReceipt
from reap_serve.traffic.request import Request


def record(prompt: int | None, answer: int | None, *, turns: int = 1, slice_name: str = "a") -> dict[str, object]:
    line = batch([USER] * turns, ASSISTANT, metadata={"reap_slice": slice_name})
    body = line["response"]["body"]  # type: ignore[index]
    body["usage"] = {"prompt_tokens": prompt, "completion_tokens": answer}
    return line


def requests(path: Path, *records: object) -> list[Request]:
    return read_records(path, *records)[0]


def test_counts_and_sums(tmp_path: Path) -> None:
    called = batch(
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]}, USER],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        tools=[CHAT_TOOL, CHAT_TOOL],
    )
    tally = ReceiptTally("tokens of m")
    one, two, three, other = requests(
        tmp_path, record(100, 10), record(200, 20), record(None, None), record(50, 5, slice_name="b")
    )
    (calls,) = requests(tmp_path, called)
    tally.add(one, 100, 11)
    tally.add(two, 190, 20)
    tally.add(three, 7, 7)
    tally.add(calls, 9, 9)
    tally.add(other, 50, 5, reached=False)
    receipt = tally.receipt()
    (file,) = receipt.files.values()
    assert file.slices["a"] == SliceReceipt(
        requests=3,
        reached=3,
        answers=3,
        turns=6,
        prompt_counts=2,
        prompt_tokens_recorded=300,
        prompt_tokens_rendered=290,
        prompt_tokens_difference=10,
        answer_counts=2,
        answer_tokens_recorded=30,
        answer_tokens_rendered=31,
        # One token either way is the end of an answer.
        answer_tokens_difference=0,
    )
    assert file.slices["default"] == SliceReceipt(requests=1, reached=1, answers=1, turns=4, tool_calls=3, tools=2)
    assert file.slices["b"] == SliceReceipt(requests=1, answers=1, turns=2)
    # 10 of 300.
    assert file.slices["a"].prompt_deviation == pytest.approx(1 / 30)
    assert file.slices["b"].prompt_deviation is None


def test_records_that_differ_are_named(tmp_path: Path) -> None:
    tally = ReceiptTally("tokens of m")
    # A prompt of one turn may differ by 16 + 2 x 8 + 5 % of 400 = 52 tokens, an answer by 8 + 5 % of 100 = 13.
    rendered = [(400, 100), (348, 100), (347, 100), (400, 113), (400, 114)]
    for request, (prompt, answer) in zip(
        requests(tmp_path, *[record(400, 100)] * len(rendered)), rendered, strict=True
    ):
        tally.add(request, prompt, answer)
    (file,) = tally.receipt().files.values()
    assert file.slices["a"].differing == 2
    assert [(each.place.rpartition(":")[2], each.part, each.recorded, each.rendered) for each in file.differences] == [
        ("3", "prompt", 400, 347),
        ("5", "answer", 100, 114),
    ]


def test_named_records_are_bounded(tmp_path: Path) -> None:
    tally = ReceiptTally("tokens of m")
    for request in requests(tmp_path, *[record(400, 100)] * 50):
        tally.add(request, 9, 9)
    (file,) = tally.receipt().files.values()
    assert (file.slices["a"].differing, len(file.differences)) == (50, MAX_NAMED)


@pytest.mark.parametrize(("rendered", "warned"), [(100, 0), (103, 0), (97, 0), (104, 1), (10, 1)])
def test_a_few_percent_warn(rendered: int, warned: int, tmp_path: Path) -> None:
    tally = ReceiptTally("tokens of m")
    for request in requests(tmp_path, *[record(100, None)] * 3):
        tally.add(request, rendered, 1)
    assert len(tally.receipt().warnings()) == warned


def test_differences_do_not_cancel(tmp_path: Path) -> None:
    tally = ReceiptTally("tokens of m")
    for request, rendered in zip(requests(tmp_path, *[record(100, None)] * 2), (50, 150), strict=True):
        tally.add(request, rendered, 1)
    (warning,) = tally.receipt().warnings()
    assert "states 200 prompt tokens and 200 were rendered, record by record 50.0% apart" in warning


def test_receipts_add_up() -> None:
    one = SliceReceipt(requests=1, prompt_tokens_recorded=3)
    assert one + SliceReceipt(requests=2, turns=4) == SliceReceipt(requests=3, turns=4, prompt_tokens_recorded=3)


def test_the_record_holds_numbers_only(tmp_path: Path) -> None:
    tally = ReceiptTally("tokens of m")
    for request in requests(tmp_path, record(400, 100)):
        tally.add(request, 9, 9)
    for part in tally.receipt().by_slice().values():
        assert all(isinstance(value, int) for value in json.loads(part.model_dump_json()).values())
