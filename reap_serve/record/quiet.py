"""Steps that no hook needs to see.

On a server most steps decode one token for each of the requests of the step before, and under a budget few of them are
recorded. Python that is called once a step finds the caches cold: a function that takes half a microsecond in a loop
takes ten there, and all hooks together half a percent of a small model's step. So the sampler draws ahead how many such
steps pass unrecorded, and the seam calls nothing else in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class QuietRun:
    """Steps like the last one that are not recorded.

    Args:
        scheduled: Rows of the last step by request: one each.
        steps: How many of its kind may pass.

    Attributes:
        passed: How many did.
    """

    __slots__ = ("_left", "_scheduled", "passed")

    def __init__(self, scheduled: Mapping[str, int], steps: int) -> None:
        self._scheduled = scheduled
        self._left = steps
        self.passed = 0

    def passes(self, scheduler_output: SchedulerOutput) -> bool:
        """Whether the step that begins is of the run; counts it then."""
        if (
            self._left == 0
            or scheduler_output.num_scheduled_tokens != self._scheduled
            # A request may end and another one of its name begin, or be computed anew from its last token on.
            or scheduler_output.finished_req_ids
            or scheduler_output.scheduled_new_reqs
            or scheduler_output.scheduled_cached_reqs.resumed_req_ids
        ):
            return False
        self._left -= 1
        self.passed += 1
        return True

    def end(self) -> bool:
        """No further step is of the run; whether all of its steps had passed."""
        complete, self._left = self._left == 0, 0
        return complete
