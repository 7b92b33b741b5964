"""Several plans against their base in one engine: each is a mask over the full model, and no checkpoint is written."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from reap_serve.compare.assemble import Candidate, report
from reap_serve.compare.measure import CompareSettings, Measured, measure, prepare
from reap_serve.compare.run import Comparison, Progress, counter
from reap_serve.compare.side import is_url, open_side
from reap_serve.errors import RequestError
from reap_serve.model import open_model
from reap_serve.plan.record import Plan, read_plan
from reap_serve.plan.sizes import CheckpointBytes, measure_checkpoint
from reap_serve.record.settings import BASE_PLAN
from reap_serve.serve.plan_check import check_plan, served_model
from reap_serve.traffic.request import Request

# Plans of a server that runs already keep their names.
NAME_PREFIX = "compare-"


def read_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """Plans by the stems of their files.

    Raises:
        InputFileError: A file is no plan.
        RequestError: Two files have one stem.
    """
    plans: dict[str, Plan] = {}
    for path in paths:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", path.name.removesuffix(".json"))[:48]
        if name in plans:
            raise RequestError(f"two plans are called {name}", "give the files different names")
        plans[name] = read_plan(path)
    return plans


def check_plans(base: str, plans: Mapping[str, Plan]) -> None:
    """Refuses plans that do not fit the base, before an engine is started; a URL's engine refuses them itself.

    Raises:
        MismatchError: A plan is for another model.
        PlanError: The router could not choose from what a plan keeps.
    """
    if not is_url(base):
        model = served_model(base)
        for name, plan in plans.items():
            check_plan(plan, model, f"plan {name}")


def sweep(
    base: str,
    plans: Mapping[str, Plan],
    requests: Sequence[Request],
    settings: CompareSettings,
    on_progress: Progress = lambda side, done, total: None,
    answer_only: Collection[str] = (),
) -> Comparison:
    """Compares the base under each plan with the base.

    Quality is that of the checkpoints that the plans would make. Latency and memory are not: the full model stays
    loaded, so they are left out.

    Args:
        base: Directory, hub id, or URL of an endpoint of `reap-serve serve`.
        plans: By name, one at least; the first is the report's candidate.
        requests: The traffic, with text.
        settings: How; of latency runs, tasks and memory budgets nothing is done.
        on_progress: Called with the name of the base or the plan, requests scored, and their number.
        answer_only: Names of the plans that route the answers alone, while the full model reads the prompts.

    Raises:
        EngineError: The engine did not start or answer, or takes no plans.
        RequestError: There is no request that fits.
    """
    if not requests:
        raise RequestError("there is no request in the traffic", "give traffic with text")
    found: dict[str, Measured] = {}
    with open_side(base, settings.server_arguments, settings.api_key, masks=True) as side:
        # The default of a server that runs already may be a plan.
        full = side.under(BASE_PLAN)
        cases = prepare(full, requests, settings).without_load()
        total = len(cases.forced) * (2 if settings.noise_floor else 1)
        quiet = settings.without_load()
        done = counter("base", total, on_progress)
        of_base = measure(full, cases, quiet, done, again=settings.noise_floor)
        for name, plan in plans.items():
            side.endpoint.load_plan(NAME_PREFIX + name, plan, "decode" if name in answer_only else "all")
            try:
                done = counter(name, len(cases.forced), on_progress)
                found[name] = measure(side.under(NAME_PREFIX + name), cases, quiet, done)
            finally:
                side.endpoint.forget_plan(NAME_PREFIX + name)
    sizes = None if is_url(base) else measure_checkpoint(open_model(base))
    candidates = [_candidate(name, plan, sizes, found[name]) for name, plan in plans.items()]
    first = candidates[0]
    return Comparison(report(base, first.name, cases, of_base, first.measured, quiet, candidates), {})


def _candidate(name: str, plan: Plan, sizes: CheckpointBytes | None, measured: Measured) -> Candidate:
    count_L = np.array([len(layer.kept) for layer in plan.layers])
    weights_bytes = None if sizes is None else sizes.at(count_L)
    memory = measured.memory.model_copy(
        update={
            "weights_bytes": weights_bytes,
            "kv_cache_tokens": None,
            "kv_cache_max_concurrency": None,
            "start_seconds": None,
            "resident_bytes": None,
            "peak_resident_bytes": None,
        }
    )
    virtual = Measured(measured.scores, measured.answers, (), memory)
    return Candidate(name, True, int(count_L.max()), weights_bytes, virtual)
