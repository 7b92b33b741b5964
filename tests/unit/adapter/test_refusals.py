"""Engines whose statistics would be wrong are refused; `test_refusal_remedies` follows each remedy."""

from __future__ import annotations

from typing import Any

import pytest
from refusable_engine import Engine, config

from reap_serve.adapter import engine_view
from reap_serve.adapter.offline import start_engine
from reap_serve.adapter.refusals import refuse_unsound
from reap_serve.errors import EngineError, RequestError
from reap_serve.record.settings import ObserveSettings

PLAIN = ObserveSettings()


def test_ranks_whose_rows_the_installed_vllm_does_not_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its patch mends is tried with a patched copy: test_defects."""
    monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config: False)
    monkeypatch.setattr(engine_view, "traces_graphs", lambda vllm_config: False)
    layers: Any = [object()]
    reason = r"2 cannot be observed: .*; apply patches/.*0006.*, or serve with one engine"
    with pytest.raises(EngineError, match=reason):
        refuse_unsound(PLAIN, config(data_parallel_size=2), layers)


def test_what_a_new_recorder_has_not_shown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    new = PLAIN.model_copy(update={"recorder": "new"})
    with pytest.raises(EngineError, match="without Python, where the new recorder sees nothing"):
        Engine(settings=new).start(monkeypatch)
    with pytest.raises(EngineError, match="the new recorder collects no optional sums"):
        Engine(graphs=False, settings=new.model_copy(update={"extra_sums": ("output_sum",)})).start(monkeypatch)
    Engine(graphs=False, settings=new).start(monkeypatch)


def test_several_engines_need_a_server() -> None:
    source: Any = None
    with pytest.raises(RequestError, match=r"data_parallel_size 2: .* or send the traffic by reap-serve replay"):
        start_engine(source, PLAIN, {"data_parallel_size": 2})


def test_a_dense_model() -> None:
    with pytest.raises(EngineError, match="no fused MoE layer"):
        refuse_unsound(PLAIN, config(), [])


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_never_refused_for_its_recorder(device: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for sums in ((), ("output_sum", "coselection_count")):
        Engine(device, graphs, ObserveSettings(extra_sums=sums)).start(monkeypatch)
