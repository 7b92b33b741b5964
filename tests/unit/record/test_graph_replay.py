"""The stand-in for a CUDA graph refuses what a graph refuses, and runs no Python."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from graph_replay import CaptureError, capture, kernels_of


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: float(x.sum()), "waits for the device"),
        (lambda x: x.tolist(), "waits for the device"),
        (lambda x: x.nonzero(), "depends on values"),
        (lambda x: x[x > 0], "depends on values"),
        (lambda x: torch.unique(x), "depends on values"),
        (lambda x: x + torch.from_numpy(np.ones(3, np.float32)), "memory of the host"),
        (lambda x: torch.sum(x, dim=0, out=torch.empty(0)), "memory of the host|allocates"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(run: Callable[[torch.Tensor], object], reason: str) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(CaptureError, match=reason):
        capture(lambda: run(x), x)


def test_what_was_never_called_before_is_refused_where_asked() -> None:
    x = torch.ones(2, 3)
    loaded = kernels_of(lambda: x + 1)
    capture(lambda: x + 1, x, loaded)
    with pytest.raises(CaptureError, match=r"mul\.Tensor was never called before"):
        capture(lambda: x * 2, x, loaded)


def test_a_replay_runs_no_python() -> None:
    x, calls = torch.ones(2), []

    def run() -> torch.Tensor:
        calls.append(1)
        return (x * 2).add_(1)

    graph = capture(run, x)
    x.fill_(3)
    graph.replay()
    assert (graph.output.tolist(), calls) == ([7.0, 7.0], [1])
