"""What a mask costs a router: nothing while no row is under a plan, and how much when rows are.

Theory: an idle hook is one attribute test and one empty loop in Python per layer and step, about 1 microsecond beside a
layer that takes hundreds; a masked step routes the rows of each plan once more over the kept experts.

Run: `python bench/serve_mask.py` on a quiet machine; needs vLLM for the CPU (`reap-serve[cpu]`), no model, no engine.

Output: one JSON object. By number of rows: microseconds of a call of vLLM's router as it is, with an idle hook, and
with all rows under two plans; `idle_ratio` = idle / plain, `masked_ratio` = masked / plain. Each time is the smallest
of several rounds, which alternate.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import torch

from reap_serve.adapter.routing import RoutedLayer, add_routing_hook
from reap_serve.record.requests import Requests
from reap_serve.record.step import BatchRows
from reap_serve.serve.mask import EngineMasks

NUM_EXPERTS, TOP_K, HIDDEN = 128, 8, 64
ROWS = (1, 32, 512)
ROUNDS, CALLS = 40, 50


def make_router() -> Any:
    """vLLM's router of a model with a softmax over 128 experts."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return CPURouter(top_k=TOP_K, global_num_experts=NUM_EXPERTS, renormalize=True)


def seconds_per_call(router: Any, x_TH: torch.Tensor, logits_TE: torch.Tensor) -> float:
    """Mean time of a call."""
    started = time.perf_counter()
    for _ in range(CALLS):
        router.select_experts(hidden_states=x_TH, router_logits=logits_TE)
    return (time.perf_counter() - started) / CALLS


def measure(rows: int) -> dict[str, float]:
    """The three times for one number of rows, microseconds."""
    plain, hooked = make_router(), make_router()
    layer: Any = SimpleNamespace(
        router=hooked, layer_id=0, layer_name="layer", moe_config=SimpleNamespace(num_logical_experts=NUM_EXPERTS)
    )
    add_routing_hook(layer, traced=False)
    requests = Requests(max_slices=4)
    masks = EngineMasks([RoutedLayer(layer)], torch.device("cpu"), requests, drift_fraction=0.0)
    masks.load("half", {0: tuple(range(0, NUM_EXPERTS, 2))})
    masks.load("other", {0: tuple(range(1, NUM_EXPERTS, 2))})
    for name in ("half", "other"):
        requests.add(name, rows, None, plan=name)
    x_TH, logits_TE = torch.zeros(rows, HIDDEN), torch.randn(rows, NUM_EXPERTS)
    first = rows // 2
    best = {"plain": float("inf"), "idle": float("inf"), "masked": float("inf")}
    for _ in range(ROUNDS):
        best["plain"] = min(best["plain"], seconds_per_call(plain, x_TH, logits_TE))
        masks.end()
        best["idle"] = min(best["idle"], seconds_per_call(hooked, x_TH, logits_TE))
        masks.begin(requests.step(BatchRows(["half", "other"], [rows - first, first], [0, 0])))
        best["masked"] = min(best["masked"], seconds_per_call(hooked, x_TH, logits_TE))
    times = {f"{name}_microseconds": round(1e6 * value, 2) for name, value in best.items()}
    ratios = {
        "idle_ratio": round(best["idle"] / best["plain"], 3),
        "masked_ratio": round(best["masked"] / best["plain"], 3),
    }
    return times | ratios


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({str(rows): measure(rows) for rows in ROWS}))


if __name__ == "__main__":
    main()
