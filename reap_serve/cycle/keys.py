"""Errors of the stages speak of options that commands have; a cycle's operator has keys of a configuration."""

from __future__ import annotations

import re
from pathlib import Path

from reap_serve.errors import ReapServeError

OPTION = re.compile(r"--[a-z][a-z-]*")
KEYS = {
    "--skip-malformed": "skip_malformed = true under [traffic]",
    "--limit": "choose.limits",
    "--budget": "choose.budget",
    "--keep-fraction": "choose.keep_fraction",
    "--keep-experts": "choose.keep_experts",
    "--criterion": "choose.criterion",
    "--mix": "choose.mix",
    "--objective": "choose.objective",
    "--multiple-of": "choose.multiple_of",
    "--tensor-parallel-size": "choose.tensor_parallel_size",
    "--engine-args": "engine.engine_args",
    "--half-life": "statistics.half_life",
}


def with_keys(error: ReapServeError, path: Path) -> ReapServeError:
    """The same failure in the words of the configuration.

    Args:
        error: What a stage raised.
        path: The configuration; named where the failure begins with one of its keys.
    """
    what, remedy = (OPTION.sub(lambda found: KEYS.get(found[0], found[0]), part) for part in (error.what, error.remedy))
    begins = OPTION.match(error.what)
    if begins is not None and begins[0] in KEYS:
        what = f"{path}: {what}"
    return type(error)(what, remedy)
