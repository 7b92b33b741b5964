"""The gate: which plan a request gets, which cache it may share, and what it may not say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap_serve.adapter import server
from reap_serve.adapter.server import AdmissionError
from reap_serve.serve.mask import PLAN_ARGUMENT
from reap_serve.serve.mask_admission import SALT_PREFIX, ResolvePlan, settle

IDS = {None: None, "base": None, "a": "id-a", "b": "id-b"}


def request(arguments: dict[str, Any] | None = None, salt: str | None = None) -> Any:
    """A request as vLLM's input processor makes it."""
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=arguments), cache_salt=salt)


def admit(made: Any, resolve: ResolvePlan) -> None:
    """Lets a request pass the gate."""
    server.admit(made, lambda arguments: settle(arguments, resolve), SALT_PREFIX)


def admitted(arguments: dict[str, Any] | None = None, salt: str | None = None) -> Any:
    """The request behind the gate."""
    made = request(arguments, salt)
    admit(made, IDS.__getitem__)
    return made


def test_a_request_without_a_plan_passes_untouched() -> None:
    for arguments in (None, {"other": 1}, {"reap_plan": "base"}):
        made = admitted(arguments, "salt")
        assert made.cache_salt == "salt"
        assert PLAN_ARGUMENT not in (made.sampling_params.extra_args or {})
    assert admitted({"other": 1}).sampling_params.extra_args == {"other": 1}


def test_plans_get_their_id_and_never_share_a_cached_prefix() -> None:
    made = [admitted({"reap_plan": name}, salt) for name in ("a", "b") for salt in (None, "x")]
    assert [each.sampling_params.extra_args for each in made] == [
        {PLAN_ARGUMENT: "id-a"},
        {PLAN_ARGUMENT: "id-a"},
        {PLAN_ARGUMENT: "id-b"},
        {PLAN_ARGUMENT: "id-b"},
    ]
    salts = {each.cache_salt for each in made} | {admitted(None, salt).cache_salt for salt in (None, "x")}
    assert len(salts) == 6


def test_the_default_is_settled_when_the_request_enters() -> None:
    default = {"name": "a"}
    made = request()
    admit(made, lambda name: IDS[default["name"] if name is None else name])
    default["name"] = "b"
    assert made.sampling_params.extra_args == {PLAN_ARGUMENT: "id-a"}


@pytest.mark.parametrize(
    ("arguments", "salt", "message"),
    [
        ({"reap_plan": "unknown"}, None, "not loaded"),
        ({"reap_plan": 3}, None, "not a string"),
        ({"reap_plan": ["a"]}, None, "not a string"),
        ({PLAN_ARGUMENT: "id-a"}, None, "reserved"),
        (None, "reap-plan:id-a:", "reserved"),
        ({"reap_slice": "line\nbreak"}, None, "printable"),
        ({"reap_slice": ""}, None, "printable"),
        ({"reap_slice": "x" * 65}, None, "printable"),
        ({"reap_slice": 1}, None, "printable"),
        ({"reap_prompt_tokens": -1}, None, "number"),
        ({"reap_prompt_tokens": "many"}, None, "number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any] | None, salt: str | None, message: str) -> None:
    with pytest.raises(AdmissionError, match=message):
        admitted(arguments, salt)


@given(st.text(min_size=1, max_size=64).filter(str.isprintable))
def test_any_printable_slice_is_admitted(name: str) -> None:
    assert admitted({"reap_slice": name}).sampling_params.extra_args == {"reap_slice": name}


def test_pooling_requests_pass() -> None:
    pooling: Any = SimpleNamespace(sampling_params=None, cache_salt="salt")
    admit(pooling, IDS.__getitem__)
    assert vars(pooling) == {"sampling_params": None, "cache_salt": "salt"}
