"""An engine of two ranks: its statistics are those of one process."""

from __future__ import annotations

from pathlib import Path

import embedded_shape
import numpy as np
import pytest
from vllm_engine import Prompt, ask, engine

from reap_serve.model import fingerprint, open_model
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.snapshot import RankSums, join_ranks
from reap_serve.records import provenance
from reap_serve.statistics.record import Statistics


def prompts() -> list[Prompt]:
    random = np.random.default_rng(11)
    return [
        Prompt(random.integers(0, embedded_shape.VOCABULARY, size=length).tolist(), name, prompt_tokens=length // 2)
        for length, name in ((70, "code"), (30, "prose"), (9, "code"))
    ]


def observed(model: Path, recorder: str, **arguments: object) -> Statistics:
    with engine(model, ObserveSettings(recorder=recorder, buffer_tokens=40), **arguments) as llm:
        ask(llm, prompts())
        ranks = [RankSums.from_bytes(content) for content in llm.collective_rpc("reap_snapshot")]
    return join_ranks(ranks, fingerprint(open_model(str(model))), {}, provenance())


@pytest.mark.slow
@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_two_tensor_parallel_ranks_give_the_statistics_of_one(
    embedded_model: Path, recorder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = observed(embedded_model, recorder)
    # By itself vLLM gives each rank a NUMA node of its own.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    together = observed(embedded_model, recorder, tensor_parallel_size=2)
    assert together.header.layers == alone.header.layers
    assert together.header.slices == alone.header.slices
    assert together.header.complete
    expected = alone.fields_by_name()
    for name, values in together.fields_by_name().items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5 if "count" not in name else 0, err_msg=name)
