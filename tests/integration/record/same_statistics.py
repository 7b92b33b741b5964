"""Statistics of two runs of the same requests, however they were run."""

from __future__ import annotations

import numpy as np

from reap_serve.statistics.record import Statistics


def require_equal(found: Statistics, expected: Statistics) -> None:
    """Counts exactly, sums to 1e-5, whatever the order in which slices were seen."""
    order = [found.header.slices.index(name) for name in expected.header.slices]
    np.testing.assert_array_equal(found.layer_token_count_SPL[order], expected.layer_token_count_SPL)
    values = found.fields_by_name()
    for name, field in expected.fields_by_name().items():
        if "layer_token" in name:
            continue
        np.testing.assert_allclose(values[name][order], field, rtol=0 if "count" in name else 1e-5, err_msg=name)
    assert found.header.complete
    for name in ("requests", "prompt_tokens_total", "prompt_tokens_computed"):
        totals = [sum(getattr(window, name) for window in part.header.windows) for part in (found, expected)]
        assert totals[0] == totals[1], name
