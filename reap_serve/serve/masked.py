"""vLLM's server on a full model that takes plans as masks, for as long as a comparison needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from reap_serve.serve.command import plugin_variable, server_command
from reap_serve.serve.process import RunningServer, engine_environment, free_port, run_server


@contextlib.contextmanager
def serve_with_masks(model: Path, arguments: Sequence[str] = ()) -> Iterator[RunningServer]:
    """`reap-serve serve` on a checkpoint with nothing recorded, until the block ends.

    Args:
        model: Model directory; also the served name.
        arguments: Further options of `vllm serve`.

    Raises:
        EngineError: It did not come up; carries its last error line.
        RequestError: The options ask for another worker extension.
    """
    # Neither statistics nor the dropped gate mass are asked for: requests under a plan cost their routing alone.
    command = server_command(str(model), {"recording": False, "drift_fraction": 0.0}, arguments)
    with run_server(command.arguments, {**engine_environment(arguments), **plugin_variable()}, free_port()) as server:
        yield server
