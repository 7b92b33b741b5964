"""The recorder that is chosen when none is asked for."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest

from reap_serve.record.choice import LayerCircumstances, choose

GPU_SERVER = LayerCircumstances(
    rows_stay=False, rows_pass=True, graphs=True, every_token=False, outputs_served=True, extra_sums=False
)


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "deferred"),
        ({"graphs": False}, "deferred"),
        ({"every_token": True}, "moe_sum"),
        ({"every_token": True, "rows_pass": False}, "deferred"),
        ({"every_token": True, "extra_sums": True}, "deferred"),
        ({"every_token": True, "graphs": False, "outputs_served": False}, "moe_sum"),
        ({"every_token": True, "graphs": False, "outputs_served": False, "rows_pass": False}, "inline"),
        ({"every_token": True, "graphs": False, "outputs_served": False, "extra_sums": True}, "inline"),
        ({"rows_stay": True, "rows_pass": False, "graphs": False}, "read"),
        ({"rows_stay": True, "rows_pass": False, "graphs": False, "extra_sums": True}, "deferred"),
    ],
)
def test_choice(change: dict[str, bool], chosen: str) -> None:
    assert choose(replace(GPU_SERVER, **change)) == chosen


def test_served_outputs_and_graphs_keep_inline_away() -> None:
    """`inline` changes the last bit of an output, and its Python does not run in a graph."""
    for values in itertools.product((False, True), repeat=len(fields(LayerCircumstances))):
        layer = LayerCircumstances(*values)
        if layer.outputs_served or layer.graphs:
            assert choose(layer) != "inline"
        if layer.extra_sums:
            assert choose(layer) in ("inline", "deferred")
