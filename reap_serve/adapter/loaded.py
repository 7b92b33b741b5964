"""One engine process with its model loaded: what the stages behind this one know of it, in words of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch

from reap_serve.adapter import engine_view, layer_view, modular_only
from reap_serve.adapter.data_parallel import DataParallelPeers
from reap_serve.adapter.refusals import refuse_unsound, refuse_untold_drafts
from reap_serve.adapter.releases.check import attribute_or_none
from reap_serve.adapter.routing import RoutedLayer
from reap_serve.adapter.stand_in import SkippedRouting
from reap_serve.adapter.unreached import refuse_unreached
from reap_serve.adapter.wiring import facts_of, wire
from reap_serve.record.captured_rows import Graphs
from reap_serve.record.recorder import LayerFacts
from reap_serve.record.settings import ObserveSettings
from reap_serve.record.step_recorder import StepRecorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class LoadedEngine:
    """One engine process whose weights are in place; nothing was compiled or captured yet.

    Args:
        model_runner: vLLM's.
        vllm_config: Its configuration.
        settings: What the engine is asked to observe.

    Attributes:
        settings: As above.
        device: Where the layers compute.
        routed_layers: Its fused MoE layers, in the order of the model.

    Raises:
        EngineError: Its statistics would be wrong.
    """

    def __init__(self, model_runner: GPUModelRunner, vllm_config: VllmConfig, settings: ObserveSettings) -> None:
        model = model_runner.get_model()
        self._layers = layer_view.moe_layers(vllm_config, model)
        refuse_unreached(model)
        refuse_unsound(settings, vllm_config, self._layers)
        modular_only.tell(self._layers)
        refuse_untold_drafts(model_runner, vllm_config)
        self._model_runner = model_runner
        self._config = vllm_config
        self.settings = settings
        self.device: torch.device = model_runner.device
        self.routed_layers = [RoutedLayer(layer) for layer in self._layers]

    def layer_facts(self) -> list[LayerFacts]:
        """What recorders need of each layer; the kernels are tried for it."""
        facts = [facts_of(layer, self.settings, self.max_rows) for layer in self._layers]
        if self._config.speculative_config is None and not self._config.parallel_config.enable_eplb:
            return facts
        # Rows that are measured where the kernel adds them wait for no verdict, and are those of EPLB's replicas.
        return [dataclasses.replace(each, adds_apart=False) for each in facts]

    def connect(self, recorder: StepRecorder) -> None:
        """Lets the layers and routers call their recorders from now on."""
        wire(self._layers, recorder)
        for layer, tap in zip(self.routed_layers, recorder.logit_taps, strict=False):
            layer.set_routing_hook(tap)

    @property
    def max_rows(self) -> int:
        """Rows of the largest step, padding included."""
        return engine_view.max_rows(self._config)

    @property
    def graphs(self) -> Graphs | None:
        """The graphs that steps will be replayed from, None where none are."""
        return engine_view.graphs(self._config)

    @property
    def agree(self) -> Callable[[float], float] | None:
        """Gives every rank of the engine the first one's value, called in the same step; None where there is one."""
        return engine_view.agreement(self._config)

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share each expert."""
        return int(self._config.parallel_config.tensor_parallel_size)

    @property
    def tensor_parallel_rank(self) -> int:
        """Of this process among those."""
        return engine_view.tensor_parallel_rank()

    @property
    def number(self) -> int:
        """Which of the data-parallel engines behind one server this process belongs to, from 0."""
        return engine_view.engine_number(self._config)

    @property
    def peers(self) -> DataParallelPeers | None:
        """The data-parallel ranks with which this one has to measure; None when it measures alone."""
        return DataParallelPeers() if self._config.parallel_config.data_parallel_size > 1 else None

    @property
    def verifies_drafts(self) -> bool:
        """Whether steps verify draft tokens, of which sampling tells how many are taken."""
        return self._config.speculative_config is not None

    @property
    def captures_graphs(self) -> bool:
        """Whether steps are replayed from captured graphs, in which no Python runs."""
        return engine_view.captures_graphs(self._config)

    @property
    def routes_in_model(self) -> bool:
        """Whether a layer's choice is made in the model, before vLLM's router."""
        return any(layer_view.routes_in_model(layer) for layer in self._layers)

    @property
    def skipped_routing(self) -> SkippedRouting | None:
        """What spares the steps of a compiled engine its routers' operators; None in an eager one."""
        return SkippedRouting(self._layers) if engine_view.traces_graphs(self._config) else None

    @property
    def model_reference(self) -> str:
        """The served model as `open_model` takes it."""
        return engine_view.model_reference(self._config)

    @property
    def header(self) -> Mapping[str, str]:
        """What ran the model, for the header of its statistics."""
        return engine_view.engine_header(self._config)

    def weights_bytes(self) -> int:
        """Bytes of the weights: as vLLM measured them on a GPU, else the tensors that the model's modules hold."""
        measured = attribute_or_none(self._model_runner, "model_memory_usage")
        if measured:
            return int(measured)
        storages: dict[int, int] = {}
        for module in cast(torch.nn.Module, self._model_runner.get_model()).modules():
            own = (value for value in vars(module).values() if isinstance(value, torch.Tensor))
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *own):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())
