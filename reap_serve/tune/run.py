"""`tune`: one engine, the traffic in three parts, and the smallest plan within the limits, or the best of a size."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from reap_serve.architectures.resolve import resolve
from reap_serve.compare.thresholds import Threshold
from reap_serve.errors import RequestError
from reap_serve.model import ModelSource, fingerprint, open_model, require_whole_weights
from reap_serve.plan.budget import uniform_count
from reap_serve.plan.limits import CountLimits, count_limits
from reap_serve.plan.model_limits import limits_of_model, limits_of_source
from reap_serve.plan.request import Size
from reap_serve.plan.sizes import measure_checkpoint
from reap_serve.publish import refuse_existing_directory
from reap_serve.records import JsonValue
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.merge import merge_files
from reap_serve.statistics.record import Statistics
from reap_serve.traffic.request import Request
from reap_serve.tune.engine import Case, TuneEngine, open_engine
from reap_serve.tune.ledger import Ledger, digest
from reap_serve.tune.limits import judge, parse_limits, require_judged
from reap_serve.tune.measuring import Measuring, PartCases, choose_answered, needs_answers
from reap_serve.tune.record import Part, SplitSummary, TrialRound, TuneReport
from reap_serve.tune.request import TuneRequest
from reap_serve.tune.result import Outcome, make_report
from reap_serve.tune.rules import Rule, criteria_rules, plan_of
from reap_serve.tune.search import Search, Tried
from reap_serve.tune.spending import Spending
from reap_serve.tune.split import split_traffic
from reap_serve.tune.trials import round_tokens, run_trials
from reap_serve.tune.write import write_result

# Requests of a slice that each part takes at most: enough for its intervals, few enough to try many plans.
MAX_REQUESTS: Mapping[str, int] = {"statistics": 100, "selection": 24, "held-out": 60}
# Masked tokens of one round of trials at most.
ROUND_TOKENS = 80_000

Say = Callable[[str], None]


def tune(request: TuneRequest, say: Say = lambda line: None) -> TuneReport:
    """Finds the smallest plan whose limits hold, or the best plan of a size, and writes it with its report.

    Args:
        request: What is asked.
        say: Shows a line of progress.

    Returns:
        The report, as it stands in `report.json`; its plan is None when nothing can go within the limits.

    Raises:
        EngineError: The engine did not start, or takes no masks.
        PlanError: The size breaks a limit of model or engine.
        RequestError: The traffic has no recorded answers or too few conversations, a limit names no figure, or the
            budget is too small.
        StorageError: The disk refused.
    """
    refuse_existing_directory(request.output, request.overwrite)
    source = open_model(request.model)
    require_whole_weights(source)
    sizes = count_limits(limits_of_source(source), request.target)
    fixed = None if request.size is None else uniform_count(request.size, sizes, None)
    answered = [entry for entry in request.requests if entry.body is not None and entry.answer is not None]
    if not answered:
        raise RequestError(
            f"none of {len(request.requests)} requests has a recorded answer, which is what plans are measured on",
            "give traffic with answers, such as your gateway's log of requests and responses",
        )
    limits = parse_limits(request.limits, {entry.slice for entry in answered})
    given = merge_files(request.statistics) if request.statistics else None
    if given is not None:
        limits_of_model(given.header, source)
    split = split_traffic(answered, request.seed)
    ledger = Ledger(request.output, digest(request, fingerprint(source)))
    spending = Spending(request.budget, ledger.seconds_before, int(str(ledger.get("masked_tokens") or 0)))
    if ledger.resumed:
        say(f"going on after {ledger.seconds_before:.0f} s of an earlier run of this request")
    layers = resolve(source.config).limits(source.config).moe_layers
    with open_engine(source, layers, _engine_arguments(request)) as engine:
        spending.engine = engine
        run = _Run(request, source, sizes, fixed, limits, ledger, spending, engine, say)
        outcome = run.outcome({part: _few(some, MAX_REQUESTS[part]) for part, some in split.parts.items()}, given)
    summary = SplitSummary(
        seed=request.seed,
        requests={part: len(cases) for part, cases in outcome.cases.items()},
        conversations=dict(split.conversations),
        left_out=len(request.requests) - sum(len(cases) for cases in outcome.cases.values()),
    )
    report = make_report(request, outcome, summary, spending, sizes.num_experts)
    checkpoint = measure_checkpoint(source)
    plan = None if outcome.best is None else plan_of(outcome.best.candidate, outcome.statistics, checkpoint)
    write_result(report, plan, outcome, checkpoint, request)
    ledger.close()
    return report


def _engine_arguments(request: TuneRequest) -> dict[str, JsonValue]:
    parallel = request.target.tensor_parallel_size
    return {**({"tensor_parallel_size": parallel} if parallel > 1 else {}), **request.engine_arguments}


def _few(requests: Sequence[Request], per_slice: int) -> list[Request]:
    seen: Counter[str] = Counter()
    chosen = []
    for entry in requests:
        if seen[entry.slice] < per_slice:
            chosen.append(entry)
        seen[entry.slice] += 1
    return chosen


class _Run:
    """The steps of one run, in order, with what they share."""

    def __init__(
        self,
        request: TuneRequest,
        source: ModelSource,
        sizes: CountLimits,
        fixed: int | None,
        limits: tuple[Threshold, ...],
        ledger: Ledger,
        spending: Spending,
        engine: TuneEngine,
        say: Say,
    ) -> None:
        self._request = request
        self._source = source
        self._sizes = sizes
        self._fixed = fixed
        self._limits = limits
        self._ledger = ledger
        self._spending = spending
        self._engine = engine
        self._say = say
        self._rounds: list[TrialRound] = []

    def outcome(self, parts: Mapping[str, Sequence[Request]], given: Statistics | None) -> Outcome:
        """Observes, searches and judges."""
        cases = {
            part: [case for case in self._engine.cases(some) if case.forced.answered] for part, some in parts.items()
        }
        for part, some in cases.items():
            if not some:
                raise RequestError(
                    f"no request of the part {part} fits {self._engine.max_model_len} tokens with its answer",
                    "raise max_model_len by --engine-args",
                )
        answers = self._request.answers_per_slice
        measured: dict[Part, PartCases] = {
            "selection": PartCases(
                cases["selection"],
                choose_answered(cases["selection"], answers) if needs_answers(self._limits) else (),
            ),
            "held-out": PartCases(cases["held-out"], choose_answered(cases["held-out"], answers)),
        }
        measuring = Measuring(self._engine, measured, self._request.max_answer_tokens, self._ledger, self._spending)
        measuring.base("selection")
        reserve = 3 * measured["held-out"].tokens
        self._require_budget(measured["selection"].tokens, 2 * measured["held-out"].tokens)
        statistics = self._statistics(cases["statistics"]) if given is None else given
        model = limits_of_model(statistics.header, self._source)
        size = Size(keep_experts=self._fixed or self._sizes.allowed[-1])
        rules = criteria_rules(statistics, model, self._request.target, size)
        allowed = tuple(count for count in self._sizes.allowed if count < self._sizes.num_experts)
        search = Search(measuring, self._limits, self._spending, allowed, reserve, self._say)
        try:
            if self._fixed is not None:
                found = self._best_of_size(search, rules, cases["statistics"], self._fixed)
            else:
                found = self._smallest(search, rules, cases["statistics"])
        finally:
            self._ledger.put("masked_tokens", self._spending.masked_tokens, self._spending.seconds)
        best, below, looks = found
        is_least = self._fixed is not None or best is None or best.candidate.keep_experts == allowed[0]
        return Outcome(
            best, below, looks, is_least, tuple(search.tried), tuple(self._rounds), statistics, cases, given is not None
        )

    def _require_budget(self, tokens: int, reserve: int) -> None:
        spending, budget = self._spending, self._request.budget
        if spending.affords(tokens, reserve):
            return
        needed = spending.describe(tokens + reserve)
        spent = f"{spending.seconds:.0f} s" if budget.seconds is not None else f"{spending.masked_tokens} masked tokens"
        raise RequestError(
            f"the budget of {budget} is too small: {spent} are spent on the start and the base, and one size takes "
            f"{needed}",
            "raise --budget, or give less traffic; what was measured is kept",
        )

    def _statistics(self, cases: Sequence[Case]) -> Statistics:
        path = self._ledger.folder / "statistics.safetensors"
        if path.is_file():
            return read_statistics(str(path))
        self._say(f"observing {len(cases)} requests")
        found = self._engine.observe(cases)
        write_statistics(found, str(path), overwrite=True)
        self._ledger.put("observed", len(cases), self._spending.seconds)
        return found

    def _smallest(
        self, search: Search, rules: Sequence[Rule], cases: Sequence[Case]
    ) -> tuple[Tried | None, Tried | None, int]:
        if not search.allowed:
            return None, None, 0
        holding = search.smallest(rules)
        if search.tried:
            require_judged(judge(self._limits, search.tried[0].slices))
        smaller = [count for count in search.allowed if not holding or count < min(holding)]
        by_trials: tuple[Rule, ...] = ()
        if smaller:
            by_trials = self._trials(search, rules, cases, smaller[-1])
            if by_trials:
                search.descend((rules[0], *by_trials), holding)
        if not holding:
            return None, self._closest(search), 0
        return search.judge(holding, (*by_trials[-1:], *rules))

    def _best_of_size(
        self, search: Search, rules: Sequence[Rule], cases: Sequence[Case], keep_experts: int
    ) -> tuple[Tried | None, Tried | None, int]:
        tried = search.at_size(rules, keep_experts)
        if not tried:
            raise RequestError(f"the budget of {self._request.budget} affords no plan", "raise --budget")
        require_judged(judge(self._limits, tried[0].slices))
        if keep_experts < self._sizes.num_experts:
            tried = search.at_size(self._trials(search, rules, cases, keep_experts), keep_experts)
        best = search.judge_one(tried[0].candidate)
        return (best, None, 1) if best.held else (None, best, 1)

    def _closest(self, search: Search) -> Tried | None:
        """The largest plan that was tried, on the held-out requests: what nothing can go means in figures."""
        if not search.tried:
            return None
        largest = max(tried.candidate.keep_experts for tried in search.tried)
        some = [tried for tried in search.tried if tried.candidate.keep_experts == largest]
        return search.judge_one(min(some, key=lambda tried: tried.figures.kl_divergence_mean).candidate)

    def _trials(
        self, search: Search, rules: Sequence[Rule], cases: Sequence[Case], keep_experts: int
    ) -> tuple[Rule, ...]:
        """The rules of each round, as far as the budget goes; none where they are not wanted."""
        if not self._request.trials:
            return ()
        chosen = _in_turn(cases, ROUND_TOKENS)
        held = search.measuring.parts["selection"].tokens * 2 + search.reserve
        while not self._spending.affords(round_tokens(chosen), held):
            chosen = chosen[: len(chosen) // 2]
            if len(chosen) < 2 * len({case.forced.slice for case in cases}):
                self._say("no trials: the budget does not afford them")
                return ()
        self._say(
            f"trials at {keep_experts} experts: {len(chosen)} requests, "
            f"{self._spending.describe(round_tokens(chosen))} a round"
        )

        def on_round(number: int, record: TrialRound) -> None:
            self._say(f"round {number + 1}: {record.masked_tokens} masked tokens, {record.seconds:.0f} s")

        rounds = run_trials(
            self._engine,
            chosen,
            _prior(rules),
            keep_experts,
            self._request.seed,
            self._ledger,
            self._spending,
            reserve=held,
            on_round=on_round,
        )
        self._rounds += [each.record for each in rounds]
        return tuple(each.rule for each in rounds)


def _prior(rules: Sequence[Rule]) -> Rule:
    """What trials begin with: `asq`, slices alike where there are several."""
    return next((rule for rule in reversed(rules) if rule.criterion == "asq"), rules[0])


def _in_turn(cases: Sequence[Case], masked_tokens: int) -> list[Case]:
    """Cases of the slices in turn, as many as a round may take."""
    queues: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        queues[case.forced.slice].append(case)
    chosen: list[Case] = []
    for place in range(max(len(queue) for queue in queues.values())):
        for name in sorted(queues):
            if place < len(queues[name]):
                chosen.append(queues[name][place])
                if round_tokens(chosen) > masked_tokens:
                    return chosen[:-1]
    return chosen
