"""The parts of the check that route by plans, and that look back from a pruned model: see `parts`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu import engines, models
from bench.gpu.oracle import DroppedMass, Oracle, snapshot, watched


def masks(graphs: str) -> dict[str, Any]:
    """Requests under plans that keep half of the experts, then others: who gets which expert, and what counts."""
    from reap_serve.plan.record import read_plan
    from reap_serve.serve.plan_check import check_plan, served_model

    halves = {name: list(range(first, models.SMALL.experts, 2)) for name, first in (("even", 0), ("odd", 1))}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        oracle = Oracle(models.write_small(model), models.SMALL.experts)
        checked = {}
        for name, kept in halves.items():
            file = Path(directory) / f"{name}.json"
            file.write_text(json.dumps(models.plan(kept)))
            checked[name] = check_plan(read_plan(file), served_model(str(model)), name)
        with watched(oracle):
            llm = engines.start(model, graphs, {"mask_places": 1, "drift_fraction": 1.0, "read_kernel_rows": False})
        try:
            oracle.follow(engines.runner_of(llm).reap_live)
            problems: list[str] = []
            dropped_rows: dict[str, int] = {}
            mass: dict[str, dict[str, float]] = {}
            for name, plan in checked.items():
                kept_of = {str(layer): list(ids) for layer, ids in plan.kept.items()}
                arguments = (name, plan.entry.model_dump(mode="json"), kept_of)
                problems += [each for each in llm.collective_rpc("reap_load_plan", args=arguments) if each is not None]
                if problems:
                    return {"passed": False, "refused": problems}
                counts = _generate(llm, oracle, plan.entry.id)
                dropped_rows[name] = int(np.delete(counts, halves[name], axis=1).sum())
                mass |= llm.collective_rpc("reap_status")[0]["gate_mass"]["plans"]
                llm.collective_rpc("reap_forget_plan", args=(name,))
            counts = _generate(llm, oracle, None)
            found, _ = snapshot(llm)
            status = llm.collective_rpc("reap_status")[0]
        finally:
            engines.stop(llm)
    result = {
        "refused": problems,
        "masked_rows_of_dropped_experts": dropped_rows,
        "other_rows_by_expert_parity": [int(counts[:, half].sum()) for half in halves.values()],
        "only_others_counted": bool(np.array_equal(found[..., 0], counts)),
        "tokens_masked": status["tokens_masked"],
        "gate_mass": mass,
    }
    passed = (
        not result["refused"]
        and not any(dropped_rows.values())
        and min(result["other_rows_by_expert_parity"]) > 0
        and result["only_others_counted"]
        and all(0 < each["default"] < 1 for each in mass.values())
    )
    return {**result, "passed": bool(passed)}


def _generate(llm: Any, oracle: Oracle, plan: str | None) -> np.ndarray:
    """Routed rows by layer and expert of requests under a plan, as the oracle counts them."""
    from vllm import SamplingParams

    from reap_serve.serve.mask import PLAN_ARGUMENT

    arguments = None if plan is None else {PLAN_ARGUMENT: plan}
    parameters = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False, extra_args=arguments)
    before = oracle.sums_LEC[..., 0].copy()
    llm.generate(engines.prompts(8, 30, seed=7), parameters, use_tqdm=False)
    # A step without requests tells the worker that these have ended; in a server it comes by itself.
    llm.llm_engine.step()
    return oracle.sums_LEC[..., 0] - before


def shadow(graphs: str, tolerance: float) -> dict[str, Any]:
    """The dropped gate mass of a model that lost half of its experts, against its full routers in PyTorch."""
    from vllm import SamplingParams

    from reap_serve.prune.decide import MtpChoice
    from reap_serve.prune.job import PruneOptions
    from reap_serve.prune.run import prune

    kept = list(range(0, models.SMALL.experts, 2))
    with tempfile.TemporaryDirectory() as directory:
        model, pruned, file = (Path(directory) / name for name in ("model", "pruned", "plan.json"))
        models.write_small(model)
        file.write_text(json.dumps(models.plan(kept)))
        prune(str(model), file, pruned, PruneOptions(MtpChoice.CUT, 2**30, 1), overwrite=False)
        oracle = DroppedMass(models.routers(model), kept, models.SMALL.top_k)
        with watched(oracle):
            llm = engines.start(pruned, graphs, {"drift_fraction": 1.0, "read_kernel_rows": False})
        try:
            oracle.follow(engines.runner_of(llm).reap_live)
            before = llm.collective_rpc("reap_status")[0]["gate_mass"]
            parameters = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, detokenize=False)
            for count, length in ((3, 40), (48, 60), (1, 700)):
                llm.generate(engines.prompts(count, length, seed=count), parameters, use_tqdm=False)
            report = llm.collective_rpc("reap_status")[0]["gate_mass"]
            measured = engines.runner_of(llm).reap_live.shadow.gate_mass.tokens
        finally:
            engines.stop(llm)
    found = report["served"].get("default")
    passed = found is not None and abs(found - oracle.fraction) <= tolerance and not before["served"]
    return {
        "passed": passed and report["refusal"] is None,
        "refusal": report["refusal"],
        "dropped_gate_mass": found,
        "expected": oracle.fraction,
        "tokens": oracle.tokens,
        "tokens_measured": measured,
    }
