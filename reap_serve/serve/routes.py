"""The routes under /v1/reap. They stand below /v1 because vLLM's `--api-key` guards nothing else.

No body names a file or a directory: what is written where, the server's configuration alone decides.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Path, Request
from pydantic import Field

from reap_serve import __version__
from reap_serve.errors import EngineError, ReapServeError
from reap_serve.plan.record import Plan
from reap_serve.record.settings import BASE_PLAN
from reap_serve.records import Record
from reap_serve.serve.join_status import first_of_engines, join_gate_mass, join_slice_limits, join_slices, join_writers
from reap_serve.serve.link import EngineLink
from reap_serve.serve.live_status import (
    GateMassReport,
    LayerBalance,
    MaskReport,
    PlanPhase,
    SliceLimits,
    WriterReport,
)
from reap_serve.serve.plan_check import ServedModel, check_plan
from reap_serve.serve.plan_files import PLAN_NAME
from reap_serve.serve.route_errors import ErrorRoute, NoSuchRoute

PlanName = Annotated[str, Field(pattern=f"^{PLAN_NAME}$")]


class Status(Record):
    """What the server is doing.

    Attributes:
        version: Of reap-serve.
        engines: Data-parallel engines behind the server; tokens, failures and times are those of all.
        recording: Whether tokens are recorded now, in all of them.
        recorder: Which recorder.
        complete: False when tokens were lost since the last reset.
        failures: Of the recorder, over all ranks.
        tokens_observed: Tokens recorded since the start. Tokens of requests under a plan are never recorded: statistics
            are those of the model as it was started.
        tokens_masked: Tokens of requests under a plan since the start.
        sample_fraction: Probability with which a token is recorded, the smallest of the engines'.
        overhead_fraction: Share of the engine's busy time that recording took, None before the first step.
        overhead_budget: Share of it that recording may take, None where nothing bounds it.
        held_bytes: Memory of the rows that CUDA graphs gather, and of those held until they are measured, of one rank.
        slice_limits: Which slices are told apart, and how many requests came with further names.
        writer: Of all ranks that write; None when nothing is written.
        mask: Plans.
        gate_mass: Dropped gate mass.
    """

    version: str
    engines: int
    recording: bool
    recorder: str
    complete: bool
    failures: int
    tokens_observed: int
    tokens_masked: int
    sample_fraction: float
    overhead_budget: float | None
    held_bytes: int
    overhead_fraction: float | None
    slice_limits: SliceLimits
    writer: WriterReport | None
    mask: MaskReport
    gate_mass: GateMassReport


class LiveStatistics(Record):
    """Aggregates since the start or the last reset; what `deferred` holds back is not in them yet.

    Attributes:
        slices: Recorded tokens by slice.
        layers: Balance of each layer.
    """

    slices: dict[str, int]
    layers: tuple[LayerBalance, ...]


class MaskChoice(Record):
    """Which plan to use.

    Attributes:
        name: The plan's name; requests choose it by `vllm_xargs: {"reap_plan": name}`.
        plan: The plan itself, to load it under the name; None when it is loaded already.
        phase: Of a plan to load: `decode` lets the full model read the prompt, and the plan write the answer.
        activate: Make it the plan of requests that choose none.
    """

    name: PlanName
    plan: Plan | None = None
    phase: PlanPhase = "all"
    activate: bool = True


class ErrorBody(Record):
    """An error as OpenAI's API has it."""

    error: dict[str, str | int | None]


router = APIRouter(
    prefix="/v1/reap",
    tags=["reap-serve"],
    responses={code: {"model": ErrorBody} for code in (400, 401, 404, 409, 503)},
    route_class=ErrorRoute,
)


def _link(request: Request) -> EngineLink:
    link = getattr(request.app.state, "reap_link", None)
    if not isinstance(link, EngineLink):
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "observation is not enabled on this server")
    return link


async def _status(link: EngineLink) -> Status:
    first, ranks = link.ranks[0], link.ranks
    engines = first_of_engines(ranks)
    busy_seconds = sum(rank.busy_seconds for rank in engines)
    return Status(
        version=__version__,
        engines=len(engines),
        recording=all(rank.recording for rank in ranks),
        recorder=first.recorder,
        complete=all(rank.complete for rank in ranks),
        failures=sum(rank.failures for rank in ranks),
        tokens_observed=sum(rank.tokens_observed for rank in engines),
        tokens_masked=sum(rank.tokens_masked for rank in engines),
        sample_fraction=min(rank.sample_fraction for rank in engines),
        overhead_budget=first.overhead_budget,
        held_bytes=max(rank.held_bytes for rank in ranks),
        overhead_fraction=sum(rank.recorder_seconds for rank in engines) / busy_seconds if busy_seconds else None,
        slice_limits=join_slice_limits(ranks),
        writer=join_writers(ranks),
        mask=first.mask,
        gate_mass=join_gate_mass(ranks),
    )


@router.get("/status")
async def status(request: Request) -> Status:
    """What is recorded, written and masked."""
    link = _link(request)
    await link.refresh()
    return await _status(link)


@router.get("/stats")
async def stats(request: Request) -> LiveStatistics:
    """Aggregates of what was recorded; nothing about single experts, requests or tokens."""
    link = _link(request)
    await link.refresh()
    return LiveStatistics(slices=join_slices(link.ranks), layers=link.layers)


@router.post("/{action}")
async def control(request: Request, action: Literal["start", "stop", "reset", "flush"]) -> Status:
    """Starts or stops recording, forgets what is not yet written and the slices' names, or writes it now."""
    if await request.body():
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"{action} takes no body")
    link = _link(request)
    if action == "flush" and link.settings.directory is None:
        raise HTTPException(HTTPStatus.CONFLICT, "the server was started without a directory for statistics")
    try:
        await link.control(action)
    except EngineError as error:
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
    return await _status(link)


@router.get("/mask")
async def read_mask(request: Request) -> MaskReport:
    """The loaded plans, and which one requests are under that choose none."""
    link = _link(request)
    await link.refresh()
    return link.mask


@router.put("/mask")
async def put_mask(request: Request, choice: MaskChoice) -> MaskReport:
    """Loads a plan, or chooses a loaded one. Requests in flight finish under the plan with which they began."""
    link = _link(request)
    if choice.name == BASE_PLAN:
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"{BASE_PLAN} is the full model; DELETE the mask to return to it")
    if choice.plan is None:
        if not choice.activate:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "there is neither a plan to load nor one to activate")
        if choice.name not in link.mask.plans:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"no plan is called {choice.name}")
        problem = await link.choose(choice.name)
    else:
        try:
            checked = check_plan(choice.plan, _model(request), f"plan {choice.name}", choice.phase)
        except ReapServeError as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from None
        problem = await link.load_plan(choice.name, checked.entry, checked.kept, activate=choice.activate)
    if problem is not None:
        raise HTTPException(HTTPStatus.CONFLICT, problem)
    return link.mask


@router.delete("/mask")
async def delete_mask(request: Request) -> MaskReport:
    """Returns requests that choose no plan to the full model; the plans stay loaded."""
    link = _link(request)
    await link.choose(None)
    return link.mask


@router.delete("/mask/{name}")
async def delete_plan(request: Request, name: Annotated[str, Path(pattern=f"^{PLAN_NAME}$")]) -> MaskReport:
    """Takes a plan's name away; requests under it finish."""
    link = _link(request)
    if name not in link.mask.plans:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"no plan is called {name}")
    await link.forget(name)
    return link.mask


def _model(request: Request) -> ServedModel:
    model = getattr(request.app.state, "reap_model", None)
    if not isinstance(model, ServedModel):
        raise HTTPException(HTTPStatus.CONFLICT, str(model or "the served model's files are not known"))
    return model


# The last of the routes, for every method.
router.add_route("/{path:path}", NoSuchRoute(router), methods=[], include_in_schema=False)  # type: ignore[arg-type]
