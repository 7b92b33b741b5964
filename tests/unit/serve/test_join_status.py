"""Two engines of two ranks each, told as one server."""

from __future__ import annotations

from reap_serve.serve.join_status import join_gate_mass, join_layers, join_slice_limits, join_slices, join_writers
from reap_serve.serve.live_status import GateMassReport, LayerCounts, MaskReport, RankStatus, SliceLimits, WriterReport


def writer(files: int, pending: int, error: str | None) -> WriterReport:
    return WriterReport(
        directory="/d",
        age_seconds=float(files),
        files_written=files,
        tokens_written=10 * files,
        tokens_pending=pending,
        write_failures=0,
        last_error=error,
    )


def rank(engine: int, slices: dict[str, int], counts: tuple[int, ...], **changes: object) -> RankStatus:
    values: dict[str, object] = {
        "recording": True,
        "recorder": "deferred",
        "complete": True,
        "failures": 0,
        "tokens_observed": 1,
        "tokens_masked": 0,
        "sample_fraction": 1.0,
        "recorder_seconds": 1.0,
        "busy_seconds": 2.0,
        "slices": slices,
        "slice_limits": SliceLimits(max_slices=16, known=tuple(slices), allowed=(), beyond={"max_slices": 1}),
        "layers": (LayerCounts(layer=3, counts=counts),),
        "weights_bytes": 1,
        "writer": None,
        "mask": MaskReport(refusal=None, plans={}, default=None),
        "gate_mass": GateMassReport(pruned=False, refusal=None, served={}, plans={"p": {"code": 0.2 * engine}}),
        "engine": engine,
    }
    return RankStatus.model_validate(values | changes)


# Tensor-parallel ranks repeat each other.
RANKS = (
    rank(0, {"code": 5}, (3, 0, 7), writer=writer(2, 4, None)),
    rank(0, {"code": 5}, (3, 0, 7)),
    rank(1, {"code": 1, "prose": 8}, (1, 0, 5), writer=writer(1, 0, "disk full")),
    rank(1, {"code": 1, "prose": 8}, (1, 0, 5)),
)


def test_engines_add_up_and_their_ranks_count_once() -> None:
    assert join_slices(RANKS) == {"code": 6, "prose": 8}
    (layer,) = join_layers(RANKS)
    assert (layer.layer, layer.routed_tokens, layer.unseen) == (3, 16, 1)
    # Jain's index of (4, 0, 12): 16^2 / (3 * (16 + 144)).
    assert layer.load_balance == 256 / 480


def test_pipeline_ranks_bring_their_own_layers() -> None:
    stages = (rank(0, {}, (1,)), rank(0, {}, (1,), layers=(LayerCounts(layer=1, counts=(2, 2)),)))
    assert [(layer.layer, layer.routed_tokens) for layer in join_layers(stages)] == [(1, 4), (3, 1)]


def test_the_files_of_all_ranks_are_told() -> None:
    report = join_writers(RANKS)
    assert report is not None
    assert (report.files_written, report.tokens_written, report.tokens_pending) == (3, 30, 4)
    assert (report.age_seconds, report.last_error) == (2.0, "disk full")
    assert join_writers(RANKS[1:2]) is None


def test_gate_mass_is_the_mean_of_the_engines() -> None:
    assert join_gate_mass(RANKS).plans == {"p": {"code": 0.1}}


def test_slice_limits_tell_of_all_engines() -> None:
    limits = join_slice_limits(RANKS)
    assert limits.known == ("code", "prose")
    assert limits.beyond == {"max_slices": 2}
