"""What `observe` says of an engine that fails, and of arguments that no engine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from reap_serve.adapter.offline import run_forced, start_engine
from reap_serve.adapter.scoring import generate_greedy, score_prompts
from reap_serve.errors import EngineError, RequestError
from reap_serve.model import ModelSource
from reap_serve.record.settings import ObserveSettings


class Engine:
    """An engine whose step fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def generate(self, *arguments: object, **options: object) -> None:
        raise self.error


def failing(error: Exception) -> Any:
    return Engine(error)


def test_a_step_that_vllm_cannot_run_is_a_failure_of_vllm() -> None:
    with pytest.raises(EngineError, match=r"^vLLM failed: head_dim 16 is not supported; see the log") as caught:
        run_forced(failing(RuntimeError("\nhead_dim 16 is not supported\n  at attention.cpp")), [])
    assert caught.value.exit_code == 1
    with pytest.raises(EngineError, match=r"^vLLM failed: AssertionError; "):
        run_forced(failing(AssertionError()), [])


@pytest.mark.parametrize("error", [RuntimeError("out of memory\n  at kernel.cpp"), ValueError("out of memory")])
def test_scores_and_answers_end_with_the_same_error(error: Exception) -> None:
    for ask in (
        lambda llm: score_prompts(llm, [[1, 2]], [1], [{}], num_top=0),
        lambda llm: generate_greedy(llm, [[1, 2]], [4], [{}], [None]),
    ):
        with pytest.raises(EngineError, match=r"^vLLM failed: out of memory; see the log above, or add --debug$"):
            ask(failing(error))


def test_what_vllm_refuses_of_a_request_is_left_to_the_caller() -> None:
    for error in (ValueError("too long"), EngineError("ours", "so")):
        with pytest.raises(type(error)) as caught:
            run_forced(failing(error), [])
        assert caught.value is error


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("dtyp", "it has dtype"), ("qqq", "names are those of the fields of vllm.EngineArgs")],
)
def test_an_argument_that_no_engine_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, remedy: str
) -> None:
    for variable in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("vllm.LLM.__init__", lambda self, *, model, **arguments: pytest.fail("it would start"))
    source = ModelSource("model", tmp_path, None, {})
    arguments = {"max_logprobs": 5, "tokenizer": "t", "enforce_eager": True, name: 1}
    with pytest.raises(RequestError) as caught:
        start_engine(source, ObserveSettings(), arguments)
    assert str(caught.value) == f"vLLM's engine has no argument {name!r}; {remedy}"
