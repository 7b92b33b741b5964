"""What is removed after a decision: by count, age and bytes; never what is served, nor a candidate that waits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from reap_serve.cycle import steps
from reap_serve.cycle.collect import plan_digest, served_plan
from reap_serve.cycle.config import CycleConfig
from reap_serve.cycle.state import State, remove_tree
from reap_serve.errors import InputFileError, RequestError
from reap_serve.plan.record import read_plan
from reap_serve.statistics.layout import read_layout
from reap_serve.statistics.storage import SUFFIX, open_source
from reap_serve.statistics.windows import ended, parse_duration


def clean(config: CycleConfig, state: State, say: Callable[[str], None]) -> None:
    """Applies `[retention]`."""
    _clean_candidates(config, state, say)
    _clean_runs(config, state, say)
    _clean_statistics(config, say)


def _clean_candidates(config: CycleConfig, state: State, say: Callable[[str], None]) -> None:
    served = served_plan(config)
    served_digest = None if served is None else plan_digest(served)
    served_place = None if config.served is None else config.served.resolve()
    count = size = 0
    newest = True
    for run, decision in state.decided():
        checkpoint = run / steps.CANDIDATE_NAME
        if not checkpoint.is_dir():
            continue
        ready = decision.candidate is not None
        waits, newest = ready and newest, newest and not ready
        is_served = checkpoint.resolve() == served_place or (
            (run / steps.PLAN_NAME).exists() and plan_digest(read_plan(run / steps.PLAN_NAME)) == served_digest
        )
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        limit = config.retention.candidate_bytes
        fits = count < config.retention.candidates and (limit is None or size + num_bytes <= limit)
        if is_served or waits or (ready and fits):
            count, size = count + 1, size + num_bytes
            continue
        say(f"removed: checkpoint {checkpoint} ({num_bytes / 1e9:.2f} GB)")
        remove_tree(checkpoint)


def _clean_runs(config: CycleConfig, state: State, say: Callable[[str], None]) -> None:
    """Old runs go unless they hold a checkpoint."""
    for run, _ in state.decided()[config.retention.runs :]:
        if not (run / steps.CANDIDATE_NAME).exists():
            say(f"removed: run {run.name}")
            remove_tree(run)


def _clean_statistics(config: CycleConfig, say: Callable[[str], None]) -> None:
    """Old local statistics files go: those that this program wrote, as their headers say. Stores are left alone."""
    rules = config.retention
    if rules.statistics_age is None and rules.statistics_bytes is None:
        return
    # What the next run collects stays, whatever the rule says.
    needed = parse_duration(config.statistics.since)
    age = needed if rules.statistics_age is None else max(needed, parse_duration(rules.statistics_age))
    now = datetime.now(UTC)
    found = []
    for root in config.statistics.paths:
        directory = Path(root)
        if "://" in root or not directory.is_dir():
            continue
        for path in directory.glob(f"*{SUFFIX}"):
            try:
                with open_source(str(path)) as (handle, size):
                    header = read_layout(handle, size, str(path)).header
                found.append((max(map(ended, header.windows)), path, size))
            except (InputFileError, RequestError):
                continue
    kept_bytes = 0
    for moment, path, size in sorted(found, reverse=True):
        too_old = rules.statistics_age is not None and moment < now - age
        too_many = rules.statistics_bytes is not None and kept_bytes + size > rules.statistics_bytes
        if too_old or (too_many and moment < now - needed):
            say(f"removed: statistics {path}")
            path.unlink(missing_ok=True)
        else:
            kept_bytes += size
