"""What one engine process does with its loaded model: recorders, masks and the shadow router, put together."""

from __future__ import annotations

from reap_serve.adapter.loaded import LoadedEngine
from reap_serve.record.requests import Requests
from reap_serve.record.step_recorder import StepRecorder
from reap_serve.serve.live import LiveEngine
from reap_serve.serve.live_build import build_live


def model_loaded(engine: LoadedEngine) -> LiveEngine:
    """What follows the engine's steps from now on; the adapter's seams call it.

    Raises:
        ReapServeError: Statistics are to be written, and the engine or the model on disk does not allow it.
    """
    requests = Requests(engine.settings.max_slices, engine.settings.slices)
    recorder = StepRecorder(
        engine.settings,
        engine.layer_facts(),
        engine.device,
        engine.tensor_parallel_size,
        requests,
        engine.max_rows,
        engine.graphs,
        engine.agree,
        draft_tokens=engine.verifies_drafts,
        peers=engine.peers,
    )
    engine.connect(recorder)
    return build_live(engine, requests, recorder)
