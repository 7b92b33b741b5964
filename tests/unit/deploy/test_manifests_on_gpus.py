"""Every manifest's own arguments, on the kernels that vLLM chooses on the GPUs of the table: none refuses itself."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml
from known_metrics import DEPLOY
from serve_lines import serve_line, settings_in

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).parents[1] / "adapter"))

from kernel_selection import PLATFORMS, choose, formats, standing_in

from reap_serve.adapter import engine_view, modular_only, refusals
from reap_serve.record.settings import ObserveSettings

VALUES = {"MODEL": "org/name", "SERVED_NAME": "model"}


def commands(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ObserveSettings, Sequence[str]]]:
    """Name, settings and vLLM's arguments of every server that a file in `deploy/` starts."""
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for name, service in services.items():
        if service.get("command", [None])[0] == "serve":
            line = serve_line(service["command"], VALUES, monkeypatch)
            yield f"compose: {name}", line.settings, line.vllm
    for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield from _of_document(f"{path.name}", document, monkeypatch)


def _of_document(
    name: str, document: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, ObserveSettings, Sequence[str]]]:
    if isinstance(document, dict):
        arguments = document.get("args")
        if isinstance(arguments, list) and arguments[:1] == ["serve"]:
            line = serve_line(arguments, VALUES, monkeypatch)
            yield name, line.settings, line.vllm
        elif isinstance(document.get("extraArgs"), list):
            yield name, *_additional(document["extraArgs"])
        elif document.get("name") == "VLLM_ADDITIONAL_ARGS":
            words = [part for word in shlex.split(document["value"], posix=False) for part in word.split("=", 1)]
            yield name, *_additional(words)
        document = list(document.values())
    if isinstance(document, list):
        for each in document:
            yield from _of_document(name, each, monkeypatch)


def _additional(arguments: Sequence[str]) -> tuple[ObserveSettings, Sequence[str]]:
    return settings_in(arguments[list(arguments).index("--additional-config") + 1]), arguments


@functools.cache
def vllm_parser() -> Any:
    """That of `vllm serve`: it ends the test at an option that vLLM has not."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Our own plugin would answer for the kernels before the stand-in does.
    with mock.patch("vllm.engine.arg_utils.load_general_plugins"):
        return make_arg_parser(FlexibleArgumentParser())


def engine_of(arguments: Sequence[str]) -> tuple[Any, bool, str]:
    """What `refuse_unsound` reads of the configuration, whether graphs are captured, and the MoE backend."""
    # Behind the command, or without it where another chart writes it.
    own = arguments[list(arguments).index("serve") + 1 :] if "serve" in arguments else (VALUES["MODEL"], *arguments)
    found = vllm_parser().parse_args(list(own))
    names = ("enable_eplb", "data_parallel_size", "pipeline_parallel_size", "tensor_parallel_size")
    parallel = SimpleNamespace(
        **{name: getattr(found, name) for name in (*names, "prefill_context_parallel_size")},
    )
    config = SimpleNamespace(
        speculative_config=found.speculative_config,
        parallel_config=parallel,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=found.kv_sharing_fast_prefill),
    )
    return config, not found.enforce_eager, found.moe_backend


def test_every_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _, _ in commands(monkeypatch)]
    assert len(names) == 7, names


def test_no_manifest_names_a_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, settings, arguments in commands(monkeypatch):
        assert settings.recorder == "auto", name
        # The replica that only sees mirrored requests records every token.
        bounded = settings.overhead_budget is not None
        assert bounded == (name != "observer.yaml") or not settings.recording, name
        assert not {"--enforce-eager", "--moe-backend"} & set(arguments), name


@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_manifest_refuses_itself(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's parser is made where vLLM is on its own platform.
    lines = [(name, settings, engine_of(arguments)) for name, settings, arguments in commands(monkeypatch)]
    modular_only.answer_for_monolithic(lambda: True)
    monkeypatch.setattr(modular_only, "building_observed_layer", lambda: True)
    monkeypatch.setattr(refusals, "refuse_misrouted_layers", lambda vllm_config, layers: None)
    monkeypatch.setattr(engine_view, "device_type", lambda: "cuda")
    with standing_in(platform):
        for name, settings, (config, graphs, backend) in lines:
            monkeypatch.setattr(engine_view, "captures_graphs", lambda vllm_config, graphs=graphs: graphs)
            for fmt in formats():
                kernel = choose(fmt, "TP1", backend)
                layers: Any = [_layer(kernel)]
                refusals.refuse_unsound(settings, config, layers)
                assert graphs, name


def _layer(kernel: Any) -> Any:
    method = SimpleNamespace(
        is_monolithic=kernel.is_monolithic(), moe_kernel=SimpleNamespace(fused_experts=object.__new__(kernel))
    )
    return SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        router=object(),
        routed_experts=SimpleNamespace(quant_method=method, expert_map=None),
        routed_output_transform=None,
    )
