"""The full router beside a pruned model's: what it would have given to the experts that are gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from routing_cases import CASES, E, H, RoutingCase, layer_with
from safetensors.torch import save_file

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.errors import InputFileError
from reap_serve.prune.checkpoint import OLD_SIDECAR_NAME, SIDECAR_NAME
from reap_serve.prune.job import SIDECAR_METADATA
from reap_serve.prune.manifest import MANIFEST_NAME
from reap_serve.record.requests import Requests
from reap_serve.record.step import BatchRows, NewRequest
from reap_serve.serve.gate_mass import HALF_LIFE_TOKENS, GateMass
from reap_serve.serve.mask import PLAN_ARGUMENT, EngineMasks
from reap_serve.serve.shadow import EngineShadow
from reap_serve.serve.sidecar import FullRouter, read_sidecar

CPU = torch.device("cpu")
# A manifest that `prune` wrote.
WRITTEN = Path(__file__).parents[1] / "prune" / "written" / "0.1.0.json"
# The last case scales by a tensor inside its function, which no checkpoint tensor tells of.
SHADOWED = [case for case in CASES if "tensor by expert" not in case.name]


class Shadowed:
    """An engine's shadow routers, and its requests."""

    def __init__(self, layer: Any, full: FullRouter) -> None:
        self.rows = Requests(max_slices=4)
        self.shadow = EngineShadow([RoutedLayer(layer)], {0: full}, CPU, self.rows, fraction=1.0)
        self.gate_mass = self.shadow.gate_mass

    @property
    def refusal(self) -> str | None:
        return self.shadow.refusal

    def label(self, batch: BatchRows) -> None:
        """A step's rows are there."""
        self.shadow.begin(self.rows.step(batch))


def shadowed(case: RoutingCase, bias_E: torch.Tensor, weight_EH: torch.Tensor) -> tuple[Any, Shadowed]:
    """The router of a pruned layer, with the full one beside it."""
    kept_D = torch.tensor(case.kept)
    router = case.make(len(case.kept), bias_E[kept_D])
    layer = layer_with(router, len(case.kept))
    add_routing_hook(layer, traced=False)
    full = FullRouter(weight_EH, (bias_E,) if "bias" in case.name else (), case.kept)
    return router, Shadowed(layer, full)


@pytest.mark.parametrize("case", SHADOWED, ids=lambda case: case.name)
def test_it_measures_what_the_mask_of_the_full_model_measures(case: RoutingCase) -> None:
    random = torch.Generator().manual_seed(5)
    bias_E, weight_EH = torch.randn(E, generator=random), torch.randn(E, H, generator=random)
    x_TH = torch.randn(40, H, generator=random)
    router, shadow = shadowed(case, bias_E, weight_EH)
    shadow.rows.add("a", 40, {"reap_slice": "code"})
    batch = BatchRows(["a"], [40], [0])
    shadow.label(batch)
    logits_TD = x_TH @ weight_EH[torch.tensor(case.kept)].T
    plain = case.make(len(case.kept), bias_E[torch.tensor(case.kept)]).select_experts(x_TH, logits_TD)
    found = router.select_experts(x_TH, logits_TD)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])

    base = case.make(E, bias_E)
    layer = layer_with(base)
    add_routing_hook(layer, traced=False)
    requests = Requests(max_slices=4)
    masks = EngineMasks([RoutedLayer(layer)], CPU, requests, drift_fraction=1.0)
    masks.load("p", {0: case.kept})
    arguments = {"reap_slice": "code", PLAN_ARGUMENT: "p"}
    requests.add("a", 40, arguments, masks.plan_of(NewRequest("a", 40, arguments)))
    masks.begin(requests.step(batch))
    base.select_experts(x_TH, x_TH @ weight_EH.T)
    expected = masks.gate_mass["p"].fractions(requests.slices)
    assert expected["code"] > 0.05
    assert shadow.refusal is None
    assert shadow.gate_mass.fractions(shadow.rows.slices) == pytest.approx(expected)


def test_a_router_that_sees_something_else_is_not_measured() -> None:
    case = CASES[0]
    weight_EH = torch.randn(E, H)
    router, shadow = shadowed(case, torch.zeros(E), weight_EH)
    shadow.rows.add("a", 3, None)
    shadow.label(BatchRows(["a"], [3], [0]))
    router.select_experts(torch.randn(3, H), 5 * torch.randn(3, len(case.kept)))
    assert shadow.refusal is not None
    assert "differ" in shadow.refusal
    shadow.label(BatchRows(["a"], [1], [3]))
    assert shadow.shadow.slots is None


def test_a_failure_is_reported_and_the_choice_stays() -> None:
    case = CASES[0]
    router, shadow = shadowed(case, torch.zeros(E), torch.randn(E, H + 1))
    shadow.rows.add("a", 3, None)
    shadow.label(BatchRows(["a"], [3], [0]))
    weights_TK, _ = router.select_experts(torch.randn(3, H), torch.randn(3, len(case.kept)))
    assert weights_TK.shape == (3, 3)
    assert shadow.refusal is not None


def test_gate_mass_is_a_mean_over_layers_and_fades() -> None:
    mass = GateMass(num_layers=2, num_slots=4, device=CPU)
    slots = torch.tensor([0, 1])
    dropped = torch.tensor([[True, False], [False, False]])
    mass.add(0, slots, torch.tensor([[3.0, 1.0], [2.0, 2.0]]), dropped)
    mass.add(1, slots, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), ~dropped)
    # (3/8 + 3/4) / 2; the second slice has no token.
    assert mass.fractions(["a", "b"]) == {"a": pytest.approx(0.5625)}
    mass.tokens = HALF_LIFE_TOKENS
    mass.decay()
    for layer in (0, 1):
        mass.add(layer, torch.tensor([0]), torch.tensor([[4.0]]), torch.tensor([[True]]))
    # Halved: (3/2 + 4) / (8/2 + 4) and (3/2 + 4) / (4/2 + 4).
    assert mass.fractions(["a"])["a"] == pytest.approx((5.5 / 8 + 5.5 / 6) / 2)
    mass.reset()
    assert mass.fractions(["a"]) == {}


def checkpoint(directory: Path, kept: list[int], index: int = 0) -> Path:
    """A pruned checkpoint's sidecar with the router of layer 0, as `prune` leaves it."""
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "hidden_size": H,
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.mlp.gate.weight": torch.ones(4, H)}, str(directory / SIDECAR_NAME))
    manifest = json.loads(WRITTEN.read_text())
    dropped = sorted(set(range(4)) - set(kept))
    manifest["plan"]["layers"] = [{"layer": f"layer {index}", "index": index, "kept": kept, "dropped": dropped}]
    manifest["layers"] = [{"index": index, "old_ids": kept}]
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    return directory


def test_the_sidecar_is_read_by_layer(tmp_path: Path) -> None:
    found = read_sidecar(checkpoint(tmp_path, [1, 3]))
    assert found is not None
    assert found[0].kept == (1, 3)
    assert found[0].weight_EH.shape == (4, H)
    assert found[0].vectors_E == ()


def test_a_checkpoint_without_a_sidecar_has_none(tmp_path: Path) -> None:
    assert read_sidecar(tmp_path) is None


def test_a_sidecar_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="different layers"):
        read_sidecar(checkpoint(tmp_path, [1, 3], index=1))
    (tmp_path / MANIFEST_NAME).write_text('{"layers": [{"index": 0}]}')
    with pytest.raises(InputFileError, match="not a valid manifest"):
        read_sidecar(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text('{"schema_version": 2, "layers": "of another form"}')
    with pytest.raises(InputFileError, match="schema version 2, this release reads version 1"):
        read_sidecar(tmp_path)


def test_quantised_routers_are_not_shadowed(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, [1, 3])
    tensors = {"model.layers.0.mlp.gate.weight_packed": torch.ones(4, H, dtype=torch.int32)}
    save_file(tensors, str(directory / SIDECAR_NAME))
    with pytest.raises(InputFileError, match="quantised"):
        read_sidecar(directory)


def test_no_loader_of_weights_finds_the_sidecar_and_the_old_name_is_read(tmp_path: Path) -> None:
    """vLLM's `runai_streamer` reads each `*.safetensors`; outputs of 0.1 had their full routers in one."""
    assert not SIDECAR_NAME.endswith((".safetensors", ".bin", ".pt"))
    directory = checkpoint(tmp_path, [1, 3])
    (directory / SIDECAR_NAME).rename(directory / OLD_SIDECAR_NAME)
    found = read_sidecar(directory)
    assert found is not None
    assert found[0].kept == (1, 3)


def test_a_sidecar_of_a_later_version_is_refused_with_both_numbers(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, [1, 3])
    weight = {"model.layers.0.mlp.gate.weight": torch.ones(4, H)}
    save_file(weight, str(directory / SIDECAR_NAME), {"format": "pt", "schema_version": "3"})
    with pytest.raises(InputFileError, match="schema version 3, this release reads version 1"):
        read_sidecar(directory)
    save_file(weight, str(directory / SIDECAR_NAME), {"format": "pt", "schema_version": "²"})
    with pytest.raises(InputFileError, match="'²' is no schema version"):
        read_sidecar(directory)
    save_file(weight, str(directory / SIDECAR_NAME), SIDECAR_METADATA)
    assert read_sidecar(directory) is not None
