"""The optional sums against loops over tokens in plain PyTorch, and what they cost when nobody asks for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_layer import FakeExperts, facts
from test_rank_sums import fingerprint, window

from reap_serve.errors import RequestError
from reap_serve.record import extra_sums
from reap_serve.record.accumulate import LayerSums
from reap_serve.record.deferred import DeferredRecorder
from reap_serve.record.extra_sums import ExtraSums, LogitTap
from reap_serve.record.inline import InlineRecorder
from reap_serve.record.sampling import RowSampler
from reap_serve.record.settings import OPTIONAL_SUMS, ObserveSettings, extra_sums_named
from reap_serve.record.snapshot import OPTIONAL, RankSums, join_ranks, layer_arrays
from reap_serve.records import provenance
from reap_serve.statistics.file import read_statistics, write_statistics
from reap_serve.statistics.record import Layer
from reap_serve.statistics.sums import Merge, Of, Sum

CPU = torch.device("cpu")
TRASH, NUM_EXPERTS, HIDDEN, TOP_K, NUM_TOKENS = 4, 4, 3, 2, 40
ALL = OPTIONAL_SUMS


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, gates, ids, logits, slots."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    logits_TE = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    gate_TK, ids_TK = logits_TE.softmax(dim=-1).topk(TOP_K)
    return x_TH, gate_TK, ids_TK, logits_TE, torch.randint(0, TRASH + 1, (NUM_TOKENS,), generator=generator)


def oracle(seed: int) -> dict[str, np.ndarray]:
    """The sums of the fake layer, whose expert e multiplies by e + 1, token by token."""
    x_TH, _, ids_TK, logits_TE, slot_T = tokens(seed)
    found = {
        "output_sum": np.zeros((TRASH, NUM_EXPERTS, HIDDEN)),
        "coselection_count": np.zeros((TRASH, NUM_EXPERTS, NUM_EXPERTS)),
        "logit_gram": np.zeros((TRASH, NUM_EXPERTS, NUM_EXPERTS)),
    }
    for t in range(NUM_TOKENS):
        slot = int(slot_T[t])
        if slot == TRASH:
            continue
        for first in ids_TK[t].tolist():
            found["output_sum"][slot, first] += (x_TH[t] * (first + 1)).numpy()
            for second in ids_TK[t].tolist():
                found["coselection_count"][slot, first, second] += 1
        found["logit_gram"][slot] += np.outer(logits_TE[t].double(), logits_TE[t].double())
    return found


@pytest.mark.parametrize("recorder", ["inline", "deferred"])
def test_recorders_collect_what_plain_pytorch_does(recorder: str) -> None:
    x_TH, gate_TK, ids_TK, logits_TE, slot_T = tokens(0)
    sampler, sums = RowSampler(1.0, TRASH, CPU), LayerSums(TRASH, NUM_EXPERTS, CPU)
    extra = ExtraSums(ALL, TRASH, NUM_EXPERTS, CPU)
    made = (
        InlineRecorder(facts(FakeExperts()), sums, sampler, extra)
        if recorder == "inline"
        else DeferredRecorder(facts(FakeExperts()), sums, sampler, 16, extra)
    )

    hook = LogitTap(extra, sampler, lambda action: action())
    hook.routed(x_TH, logits_TE, gate_TK, ids_TK)  # a warm-up run: no step has begun
    sampler.begin(slot_T.numpy())
    hook.routed(x_TH, logits_TE, gate_TK, ids_TK)
    made.record(x_TH, gate_TK, ids_TK)
    made.flush()
    found = extra.arrays(TRASH)
    assert set(found) == set(ALL) == set(oracle(0)), "each has a number of its own"
    for name, expected in oracle(0).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_padded_ids_and_gates_of_zero_leave_no_output() -> None:
    extra = ExtraSums(ALL, TRASH, NUM_EXPERTS, CPU)
    rows_TKH = torch.ones(2, TOP_K, HIDDEN)
    extra.add_rows(torch.zeros(2).long(), torch.tensor([[1, -1], [1, 2]]), rows_TKH, torch.tensor([[0.5, 1], [1, 0.0]]))
    assert extra.arrays(1)["output_sum"][0].tolist() == [[0] * 3, [3] * 3, [0] * 3, [0] * 3]
    assert extra.arrays(1)["coselection_count"][0].tolist() == [[0] * 4, [0, 2, 1, 0], [0, 1, 1, 0], [0] * 4]


def test_they_reach_the_statistics_file_and_come_back(tmp_path: Path) -> None:
    sums = LayerSums(TRASH, NUM_EXPERTS, CPU)
    x_TH, gate_TK, ids_TK, logits_TE, slot_T = tokens(1)
    extra, sampler = ExtraSums(ALL, TRASH, NUM_EXPERTS, CPU), RowSampler(1.0, TRASH, CPU)
    sampler.begin(slot_T.numpy())
    InlineRecorder(facts(FakeExperts()), sums, sampler, extra).record(x_TH, gate_TK, ids_TK)
    extra.add_logits(slot_T, logits_TE)
    layers = (Layer(index=0, name="model.layers.0.mlp.experts"),)
    rank = RankSums.stack(window(), layers, ("a", "b"), [layer_arrays(sums, 2, 2, extra)])
    model = fingerprint(1).model_copy(update={"num_experts": NUM_EXPERTS, "top_k": TOP_K})
    joined = join_ranks([RankSums.from_bytes(rank.to_bytes())], model, {}, provenance())
    write_statistics(joined, str(tmp_path / "s.safetensors"), overwrite=False)
    read = read_statistics(str(tmp_path / "s.safetensors")).fields_by_name()
    for name, expected in oracle(1).items():
        np.testing.assert_allclose(
            read[OPTIONAL[name]], expected.reshape(2, 2, 1, *expected.shape[1:]), rtol=1e-5, atol=1e-5, err_msg=name
        )
    assert read["coselection_count_SPLEE"].dtype == np.int64


def test_nobody_pays_for_what_was_not_asked() -> None:
    assert ObserveSettings().extra_sums == ()
    assert ObserveSettings(extra_sums=("output_sum", "coselection_count")).sums_of_logits == ()
    assert ObserveSettings(extra_sums=ALL).sums_of_logits == tuple(extra_sums.LOGIT_FORMULAS)
    sums = LayerSums(TRASH, NUM_EXPERTS, CPU)
    rank = RankSums.stack(window(), (Layer(index=0, name="l"),), ("a",), [layer_arrays(sums, 1, 2)])
    assert rank.extra == {}
    extra = ExtraSums((), TRASH, NUM_EXPERTS, CPU)
    extra.add_rows(torch.zeros(1).long(), torch.tensor([[1, 0]]), torch.ones(1, TOP_K, HIDDEN), None)
    assert extra.arrays(TRASH) == {}


def test_the_memory_of_a_sum_follows_its_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(total_E: torch.Tensor, outputs: extra_sums.RoutedOutputs) -> None:
        largest_TK = outputs.rows_TKH.double().amax(dim=-1)
        total_E.index_add_(0, outputs.ids_TK.reshape(-1), largest_TK.reshape(-1))

    fourth = Sum("largest_sum_SPLE", Of.OUTPUTS, Merge.ADD, is_count=False, is_optional=True, reference=None)
    monkeypatch.setattr(extra_sums, "EXPERT_SUMS", (fourth,))
    monkeypatch.setattr(extra_sums, "OUTPUT_FORMULAS", {"largest_sum": add})
    extra = ExtraSums(["largest_sum"], TRASH, NUM_EXPERTS, CPU)
    extra.add_rows(torch.zeros(2).long(), torch.tensor([[1, 0], [1, 2]]), torch.ones(2, TOP_K, HIDDEN), None)
    assert extra.arrays(1)["largest_sum"].tolist() == [[1, 2, 1, 0]]


def test_names_are_looked_up_once() -> None:
    assert extra_sums_named(["logit_gram", "output_sum", "logit_gram"]) == ("output_sum", "logit_gram")
    with pytest.raises(RequestError, match="no optional sum nonsense; use one of: output_sum, coselection_count, log"):
        extra_sums_named(["nonsense"])
