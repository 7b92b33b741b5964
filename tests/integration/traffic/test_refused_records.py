"""Records that vLLM or the template refuses, between sound ones, through a real engine; and the receipt of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from transformers import AutoTokenizer

import reap_serve.demo
from reap_serve.adapter.offline import observe_traffic
from reap_serve.errors import TrafficError
from reap_serve.model import open_model
from reap_serve.record.settings import ObserveSettings
from reap_serve.traffic.malformed import Malformed
from reap_serve.traffic.read import read_traffic
from reap_serve.traffic.refusal import Refusals

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

MODEL = Path(reap_serve.demo.__file__).parent / "tiny_moe" / "model"
ANSWER = {"role": "assistant", "content": "The stone one."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
FILE = {"type": "file", "file": {"file_id": "f"}}


def chat(content: object, **usage: int) -> dict[str, object]:
    body = {"choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}], "usage": usage}
    return {
        "url": "/v1/chat/completions",
        "custom_id": "a",
        "body": {"messages": [{"role": "user", "content": content}]},
        "response": {"status_code": 200, "body": body},
    }


def completion(prompt: object) -> dict[str, object]:
    return {"url": "/v1/completions", "custom_id": "a", "body": {"prompt": prompt}}


REFUSED = {
    "image": chat([IMAGE]),
    "part": chat([FILE]),
    "empty": completion(""),
    "vocabulary": completion([999_999_999]),
}


@pytest.fixture(scope="module")
def recorded_tokens() -> tuple[int, int]:
    """Tokens of the sound prompt and its answer, with its end, by the template and the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    asked = [{"role": "user", "content": "Bridge 1?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    length = len(tokenizer.encode(prompt, add_special_tokens=False))
    answer = len(tokenizer.encode(str(ANSWER["content"]), add_special_tokens=False))
    return length, answer + 1


def test_they_are_counted_and_the_others_run(tmp_path: Path, recorded_tokens: tuple[int, int]) -> None:
    prompt, answer = recorded_tokens
    sound = chat("Bridge 1?", prompt_tokens=prompt, completion_tokens=answer)
    cut = chat("Bridge 1?", prompt_tokens=prompt + 400, completion_tokens=answer)
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [sound, *REFUSED.values(), sound, cut]))
    refusals = Refusals(skip=True, malformed=Malformed())
    requests = read_traffic([str(path)], skip_malformed=True, malformed=refusals.malformed)
    done = observe_traffic(
        open_model(str(MODEL)), requests, ObserveSettings(), {"max_model_len": 128}, refusals=refusals
    )
    assert done.requests == 3
    assert refusals.malformed.total == 4
    reasons = " ".join(refusals.malformed.counts)
    assert "the prompt is empty" in reasons
    assert "Token id N is out of vocabulary" in reasons
    assert sorted(int(place.rpartition(":")[2]) for place in refusals.malformed.first.values()) == [2, 3, 4, 5]
    # Each sound request enters with its prompt and its answer but for the end.
    assert done.tokens == 3 * (prompt + answer - 1)
    receipt = done.statistics.header.traffic["default"]
    assert (receipt.reached, receipt.prompt_counts, receipt.prompt_tokens_recorded) == (3, 3, 3 * prompt + 400)
    assert (receipt.prompt_tokens_rendered, receipt.prompt_tokens_difference) == (3 * prompt, 400)
    assert receipt.answer_tokens_rendered == receipt.answer_tokens_recorded == 3 * answer
    assert receipt.differing == 1
    (warning,) = done.receipt.warnings()
    assert f"states {3 * prompt + 400} prompt tokens and {3 * prompt} were rendered" in warning


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_the_first_stops_with_its_place(name: str, tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [chat("Bridge 1?"), REFUSED[name]]))
    with pytest.raises(TrafficError, match=r"traffic.jsonl:2: refused by the engine: "):
        observe_traffic(open_model(str(MODEL)), read_traffic([str(path)]), ObserveSettings(), {"max_model_len": 128})
