"""What a server does with its configuration before it answers the first request."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, live_engine
from prometheus_client import CollectorRegistry, generate_latest
from routing_cases import E
from safetensors.numpy import save_file

from reap_serve.errors import ReapServeError
from reap_serve.monitor import plugin as monitor_plugin
from reap_serve.monitor.metrics import Exporter
from reap_serve.monitor.plugin import ReapMetrics
from reap_serve.record.settings import CONFIG_KEY
from reap_serve.serve import plugin as serve_plugin
from reap_serve.serve.ending import Ending
from reap_serve.serve.mask import PLAN_ARGUMENT
from reap_serve.serve.plugin import ReapEndpoints


@pytest.fixture(autouse=True)
def no_server_ends_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is told to stop ends its process in time; here that is the process of the tests."""
    monkeypatch.setattr(serve_plugin, "Ending", lambda engine: Ending(engine, leave=lambda code: None))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The files of a model with one layer of E experts."""
    directory = tmp_path / "model"
    directory.mkdir()
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": E, "num_experts_per_tok": 3}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.mlp.gate.weight": np.ones((E, 4), np.float32)}, str(directory / "model.safetensors"))
    return directory


def plan_file(path: Path, kept: list[int]) -> Path:
    """A plan by hand."""
    dropped = [expert for expert in range(E) if expert not in kept]
    layer = {"layer": "model.layers.0.mlp.experts", "index": 0, "kept": kept, "dropped": dropped}
    path.write_text(json.dumps({"schema_version": 1, "model": {}, "criterion": "by hand", "layers": [layer]}))
    return path


class Client(FakeEngine):
    """vLLM's client with what the plugins read of it."""

    errored = False

    def __init__(self, model: Path, settings: dict[str, Any] | None, mask_refusal: str | None = None) -> None:
        super().__init__(live_engine(mask_refusal=mask_refusal))
        self.vllm_config = SimpleNamespace(
            additional_config={} if settings is None else {CONFIG_KEY: settings},
            model_config=SimpleNamespace(model=str(model), revision=None),
            parallel_config=SimpleNamespace(_api_process_rank=0),
            cache_config=SimpleNamespace(kv_cache_size_tokens=4096),
        )
        self.generated: list[Any] = []
        self.input_processor = SimpleNamespace(
            process_inputs=self._process, renderer=SimpleNamespace(_executor=ThreadPoolExecutor(1))
        )

    @staticmethod
    def _process(request_id: str, prompt: str, params: Any) -> Any:
        return SimpleNamespace(sampling_params=params, cache_salt=None)

    def shutdown(self, timeout: float = 0.0) -> None:
        """There is nothing to stop."""

    def generate(self, prompt: str, sampling_params: Any, request_id: str) -> str:
        self.generated.append(sampling_params)
        return "stream"


def started(client: Client) -> Any:
    """The server's state after both plugins."""
    state = SimpleNamespace()

    async def start() -> None:
        await ReapEndpoints().init_state(client, state, Namespace())  # type: ignore[arg-type]
        await ReapMetrics().init_state(client, state, Namespace())  # type: ignore[arg-type]

    asyncio.run(start())
    return state


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """A registry of this test's own."""
    fresh = CollectorRegistry()
    monkeypatch.setattr(monitor_plugin, "Exporter", lambda: Exporter(fresh))
    return fresh


def test_plans_of_the_configuration_are_there_before_the_first_request(
    model: Path, tmp_path: Path, registry: CollectorRegistry
) -> None:
    plans = {
        name: str(plan_file(tmp_path / f"{name}.json", kept)) for name, kept in (("a", [0, 1, 2]), ("b", [3, 4, 5]))
    }
    client = Client(model, {"plans": plans, "mask": "b"})
    state = started(client)
    assert set(state.reap_link.mask.plans) == {"a", "b"}
    assert state.reap_link.mask.default == "b"
    request = client.input_processor.process_inputs("id", "prompt", SimpleNamespace(extra_args=None))
    assert request.sampling_params.extra_args == {PLAN_ARGUMENT: state.reap_link.mask.plans["b"].id}
    assert request.cache_salt
    scraped = generate_latest(registry).decode()
    assert 'reap_serve_plan_active{plan="b"} 1.0' in scraped
    assert "reap_serve_kv_cache_capacity_tokens 4096.0" in scraped


def test_a_stream_for_an_unknown_plan_does_not_begin(model: Path, registry: CollectorRegistry) -> None:
    from vllm.exceptions import VLLMValidationError

    client = Client(model, {})
    started(client)
    assert client.generate("prompt", SimpleNamespace(extra_args=None), "id") == "stream"
    for call in (
        client.generate,
        lambda prompt, params, name: client.input_processor.process_inputs(name, prompt, params),
    ):
        with pytest.raises(VLLMValidationError, match="not loaded"):
            call("prompt", SimpleNamespace(extra_args={"reap_plan": "x"}), "id")
    assert len(client.generated) == 1


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"plans": {"a": "{tmp}/gone.json"}}, None),
        ({"plans": {"a": "{tmp}/few.json"}}, None),
        ({"plans": {"a": "{tmp}/good.json"}}, "graphs are replayed"),
        ({"mask": "nobody"}, None),
    ],
)
def test_a_plan_that_cannot_be_used_stops_the_start(
    model: Path, tmp_path: Path, settings: dict[str, Any], refusal: str | None
) -> None:
    plan_file(tmp_path / "few.json", [0, 1])
    plan_file(tmp_path / "good.json", [0, 1, 2])
    filled = json.loads(json.dumps(settings).replace("{tmp}", str(tmp_path)))
    with pytest.raises(ReapServeError):
        started(Client(model, filled, refusal))


@pytest.mark.parametrize("broken", [False, True])
def test_a_server_that_stops_writes_before_the_engine_hears_of_it(
    model: Path, tmp_path: Path, registry: CollectorRegistry, broken: bool
) -> None:
    client = Client(model, {"directory": str(tmp_path / "live")})
    order: list[str] = client.calls

    def shutdown(timeout: float) -> str:
        order.append(f"shutdown {timeout}")
        return "stopped"

    client.shutdown = shutdown  # type: ignore[attr-defined]
    state = SimpleNamespace()

    async def serve_and_stop() -> object:
        await ReapEndpoints().init_state(client, state, Namespace())  # type: ignore[arg-type]
        if broken:
            client.collective_rpc = None  # type: ignore[assignment, method-assign]
        # As vLLM does: in a thread, while the loop runs.
        return await asyncio.get_running_loop().run_in_executor(None, lambda: client.shutdown(timeout=0))  # type: ignore[attr-defined]

    assert asyncio.run(serve_and_stop()) == "stopped"
    wanted = ["shutdown 0"] if broken else ["reap_flush", "reap_farewell", "shutdown 0"]
    assert order[-len(wanted) :] == wanted


def test_without_our_key_nothing_happens(model: Path) -> None:
    client = Client(model, None)
    state = started(client)
    assert vars(state) == {}
    assert client.calls == []


def test_only_the_first_of_several_api_servers_exports(model: Path, registry: CollectorRegistry) -> None:
    client = Client(model, {})
    client.vllm_config.parallel_config._api_process_rank = 1
    assert started(client).reap_link.listeners == []
    assert generate_latest(registry) == b""


def test_an_unknown_family_serves_without_plans(model: Path, registry: CollectorRegistry) -> None:
    (model / "config.json").write_text('{"model_type": "unheard_of"}')
    state = started(Client(model, {}))
    assert "unheard_of" in state.reap_model
