"""The search: which rule at which size, by the selection requests, and how small, by the held-out ones.

The selection requests choose: at each size, among the rules that meet the limits, the one of the lowest divergence if
that is below REAP's by more than noise (see `guard`), else REAP. The held-out requests judge the chosen plan of one
size after the other and choose among no rules. They are asked from the selection's size downwards, and the first that
fails ends it: a fixed sequence of tests, in which the chance to accept a size that does not hold is that of a single
test (Learn then Test, arXiv 2110.01052, section 3). Where the first one fails, larger sizes are asked until one holds;
then the chance grows with the number of looks, which the report tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from reap_serve.compare.record import Quality
from reap_serve.compare.thresholds import Threshold
from reap_serve.tune.guard import difference, is_lower
from reap_serve.tune.measuring import Measuring, figures
from reap_serve.tune.record import CandidateResult, Difference, Figures, Part
from reap_serve.tune.rules import Candidate, Rule, candidate
from reap_serve.tune.spending import Spending

# Rules that go on being tried after the first size, and where the budget does not afford all of them.
SEVERAL_RULES, FEW_RULES = 3, 2


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate and what it did on one part."""

    candidate: Candidate
    part: Part
    figures: Figures
    slices: dict[str, Quality]
    over_reap: Difference | None = None

    @property
    def held(self) -> bool:
        """Whether every limit holds."""
        return all(limit.held for limit in self.figures.limits)

    def result(self, chosen: bool) -> CandidateResult:
        """For the report."""
        rule = self.candidate.rule
        return CandidateResult(
            criterion=rule.criterion,
            variant=rule.variant,
            keep_experts=self.candidate.keep_experts,
            part=self.part,
            held=self.held,
            figures=self.figures,
            over_reap=self.over_reap,
            chosen=chosen,
        )


@dataclass(slots=True)
class Search:
    """Tries plans and notes all of them.

    Attributes:
        measuring: Measures them.
        limits: What shall hold.
        spending: The budget; `reserve` tokens of it are kept for the held-out requests.
        allowed: Sizes smaller than the whole model, ascending.
        reserve: See above.
        say: Tells of progress.
        tried: Everything that was tried, in that order.
    """

    measuring: Measuring
    limits: Sequence[Threshold]
    spending: Spending
    allowed: tuple[int, ...]
    reserve: int
    say: Callable[[str], None]
    tried: list[Tried] = field(default_factory=list)

    def at_size(self, rules: Sequence[Rule], keep_experts: int) -> list[Tried]:
        """Tries rules at one size on the selection requests, and ranks all that were tried at it, see `ranked`.

        Of rules that the budget does not afford the last are left out; empty where it affords none.
        """
        before = {tried.candidate.rule.name for tried in self.ranked(keep_experts)}
        chosen = [candidate(rule, keep_experts) for rule in rules if rule.name not in before]
        while chosen and not self._affords(chosen):
            chosen = chosen[: FEW_RULES if len(chosen) > FEW_RULES else len(chosen) - 1]
        self._try(chosen, "selection")
        found = self.ranked(keep_experts)
        for tried in found[:1]:
            state = "holds" if tried.held else "does not hold"
            self.say(
                f"{keep_experts} experts, {len(found)} rules: {tried.candidate.rule.name} {state}, "
                f"KL {tried.figures.kl_divergence_mean:.4f}"
            )
        return found

    def ranked(self, keep_experts: int) -> list[Tried]:
        """What the selection requests say of a size, best first.

        Plans that hold come before others. Among those, the ones that diverge less than REAP's by more than noise come
        first, then REAP's, then the rest; each by divergence. Where REAP was not tried there is no such order.
        """

        def place(tried: Tried) -> int:
            if tried.over_reap is None:
                return 1
            return 0 if is_lower(tried.over_reap) else 2

        known = [
            tried for tried in self.tried if tried.part == "selection" and tried.candidate.keep_experts == keep_experts
        ]
        return sorted(known, key=lambda tried: (not tried.held, place(tried), tried.figures.kl_divergence_mean))

    def smallest(self, rules: Sequence[Rule]) -> dict[int, Tried]:
        """The best candidate of each size that holds on the selection requests, by bisection over the sizes.

        Sizes are taken as ordered: what holds at a size holds at larger ones. After the first size REAP, which is the
        first of the rules, and the best others alone go on. Where the budget affords one more size and none holds yet,
        that is the largest.
        """
        holding: dict[int, Tried] = {}
        ranked = list(rules)
        low, high = -1, len(self.allowed)
        while high - low > 1:
            middle = (low + high) // 2
            one = self.measuring.parts["selection"].tokens
            if not holding and not self.spending.affords((FEW_RULES + 1) * one, self.reserve):
                middle = high - 1
            found = self.at_size(ranked, self.allowed[middle])
            if not found:
                break
            order = {id(tried.candidate.rule): place for place, tried in enumerate(found)}
            others = sorted(ranked[1:], key=lambda rule: order.get(id(rule), len(order)))
            ranked = [ranked[0], *others[: SEVERAL_RULES - 1]]
            if found[0].held:
                high = middle
                holding[self.allowed[middle]] = found[0]
            else:
                low = middle
        return holding

    def descend(self, rules: Sequence[Rule], holding: dict[int, Tried]) -> None:
        """Tries further rules at the smallest size that holds, and at smaller ones as long as they hold."""
        index = self.allowed.index(min(holding)) if holding else len(self.allowed) - 1
        while index >= 0:
            keep_experts = self.allowed[index]
            found = self.at_size(rules, keep_experts)
            if found and found[0].held:
                holding[keep_experts] = found[0]
            if keep_experts not in holding:
                return
            index -= 1

    def judge(self, holding: dict[int, Tried], rules: Sequence[Rule]) -> tuple[Tried | None, Tried | None, int]:
        """Asks the held-out requests.

        Args:
            holding: The best candidate of each size that holds on the selection requests.
            rules: Rules for sizes that were not tried yet, the best first.

        Returns:
            The smallest plan that holds, the next smaller size that does not, and the number of sizes judged.
        """
        best: Tried | None = None
        below: Tried | None = None
        looks = 0
        # What was kept back is for this; of it one more look is kept while a size is chosen.
        self.reserve = self.measuring.parts["held-out"].tokens
        index = self.allowed.index(min(holding))
        while 0 <= index < len(self.allowed):
            keep_experts = self.allowed[index]
            chosen = self._chosen_at(keep_experts, holding, rules)
            if chosen is None:
                break
            tried = self._try([chosen], "held-out")[0]
            looks += 1
            self.say(
                f"held-out: {keep_experts} experts by {chosen.rule.name} "
                f"{'hold' if tried.held else 'do not hold'}, KL {tried.figures.kl_divergence_mean:.4f}"
            )
            if tried.held:
                best = tried
                if below is not None:
                    break
                index -= 1
            else:
                below = tried
                if best is not None:
                    break
                index += 1
            if not self.spending.affords(self.measuring.parts["held-out"].tokens):
                break
        return best, below, looks

    def judge_one(self, chosen: Candidate) -> Tried:
        """Measures one plan on the held-out requests."""
        return self._try([chosen], "held-out")[0]

    def _chosen_at(self, keep_experts: int, holding: dict[int, Tried], rules: Sequence[Rule]) -> Candidate | None:
        """What the selection requests choose at a size."""
        if keep_experts in holding:
            return holding[keep_experts].candidate
        known = self.ranked(keep_experts) or self.at_size(rules, keep_experts)
        return known[0].candidate if known else None

    def _affords(self, chosen: Sequence[Candidate]) -> bool:
        masks = [each.mask for each in chosen]
        return self.spending.affords(self.measuring.cost(masks, "selection"), self.reserve)

    def _try(self, chosen: Sequence[Candidate], part: Part) -> list[Tried]:
        measured = self.measuring.measure([each.mask for each in chosen], part)
        found = [
            Tried(each, part, figures(slices, self.limits), slices, self._over_reap(each, chosen, part))
            for each, slices in zip(chosen, measured, strict=True)
        ]
        self.tried += found
        return found

    def _over_reap(self, plan: Candidate, chosen: Sequence[Candidate], part: Part) -> Difference | None:
        """A plan against REAP's of its size, where that is among those chosen or was tried before."""
        known = (tried.candidate for tried in self.ranked(plan.keep_experts))
        reap = next((each for each in (*chosen, *known) if each.rule.is_reap), None)
        if plan.rule.is_reap or reap is None or part != "selection":
            return None
        return difference(*(self.measuring.by_request(each.mask, part) for each in (plan, reap)))
