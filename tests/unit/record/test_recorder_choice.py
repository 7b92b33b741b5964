"""Which recorder a layer gets, and how the header names those that recorded."""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch
from fake_layer import FakeExperts, facts

from reap_serve.record.choice import RecorderKind
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.recorders import NAMES, RECORDERS, recorder_kind, recorders_named
from reap_serve.record.requests import Requests
from reap_serve.record.settings import ObserveSettings, RecorderName
from reap_serve.record.step_recorder import StepRecorder


class Outputs:
    """A kernel that leaves its outputs."""

    row_bytes = 8

    def read(self, num_routes: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError


def layer(index: int, *, readable: bool) -> LayerFacts:
    return dataclasses.replace(facts(FakeExperts()), index=index, kernel_output=Outputs() if readable else None)


def test_outputs_that_are_there_are_read_unless_it_is_forbidden_or_not_enough() -> None:
    readable, other = layer(0, readable=True), layer(0, readable=False)
    for name in ("inline", "deferred"):
        settings = ObserveSettings(recorder=name)
        assert recorder_kind(settings, readable) == "read"
        assert recorder_kind(settings, other) == name
        assert recorder_kind(ObserveSettings(recorder=name, read_kernel_rows=False), readable) == name
        assert recorder_kind(ObserveSettings(recorder=name, extra_sums=("output_sum",)), readable) == name


def test_a_recorder_that_is_not_the_same_as_reading_is_kept_where_it_is_asked_for() -> None:
    for name in ("moe_sum", "a new one"):
        settings = ObserveSettings().model_copy(update={"recorder": name})
        assert recorder_kind(settings, layer(0, readable=True)) == name


def test_every_recorder_has_a_name_that_users_know() -> None:
    assert set(RECORDERS) == set(NAMES) == set(get_args(RecorderKind))
    assert set(get_args(RecorderName)) - {"auto"} <= set(NAMES.values())


def test_the_window_names_the_recorder_of_each_layer() -> None:
    layers = [layer(index, readable=index != 4) for index in (0, 1, 2, 3, 4, 5)]
    settings = ObserveSettings(recorder="deferred")
    recorder = StepRecorder(settings, layers, torch.device("cpu"), 1, Requests(settings.max_slices), max_rows=8)
    assert recorder.snapshot().window.recorder == "deferred (layers 4), read (layers 0-3, 5)"


def test_recorders_that_are_all_the_same_are_named_once() -> None:
    assert recorders_named(dict.fromkeys(range(9), "read")) == "read"
    assert {type(kind) for kind in RECORDERS} == {str}
