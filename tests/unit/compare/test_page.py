"""The page's text: what it says, what it escapes, what it leaves out."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from small_report import full_report, small_quality, small_report

from reap_serve.compare import page as page_module
from reap_serve.compare.page import report_page
from reap_serve.compare.record import LatencySides, Report, SliceReport
from reap_serve.compare.verdict import judge_slice, verdict_line
from reap_serve.compare.write import write_report

pytest.importorskip("plotly")


def words(page: str) -> str:
    """The page without scripts, styles and tags."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def page_of(report: Report) -> str:
    page = report_page(report)
    assert page is not None
    return page


def test_it_says_what_the_report_says() -> None:
    text = words(page_of(small_report()))
    assert "org/base-pruned against org/base" in text
    assert (
        "▲ 1 of 2 slices beyond the limits: code. Farthest: code, rise of loops 25.0% [18.8%, 31.2%], limit 2.0%."
        in text
    )
    assert "▲ 0.4000 [0.3000, 0.5000]" in text
    assert "✓ 0.0400 [0.0300, 0.0500]" in text
    assert "5.000 → 10.000" in text
    assert "▲ 0% → 25% [19%, 31%]" in text
    assert "Left out as too long: 1 requests." in text


def test_the_noise_floor_stands_beside_the_figures() -> None:
    text = words(page_of(small_report()))
    # 0.4 * 0.005, 1 + 0.005, 1 - 0.2 * 0.005
    for figure in ("base twice 0.0020", "base twice 1.005", "base twice 99.9%", "base twice 50%"):
        assert figure in text


def test_llama_cpps_names() -> None:
    text = words(page_of(small_report()))
    for name in ("Mean PPL(Q)", "Mean PPL(base)", "Mean ln(PPL(Q)/PPL(base))", "Mean KLD", "Maximum KLD", "99.9% KLD",
                 "99.0% KLD", "Median KLD", "Mean Δp", "RMS Δp", "Same top p"):  # fmt: skip
        assert name in text
    # ln 2; half of ln(2.5 / 1.5)
    assert "0.6931 ± 0.2554" in text


def test_tasks_candidates_and_budget() -> None:
    text = words(page_of(full_report()))
    assert "gsm8k lm-eval exact_match,strict-match 0.8200 0.8000 97.6 % [90.0 %, 105.0 %] 200 pairs" in text
    assert "wikitext lm-eval word_perplexity,none 0.8200 12.0000 – 200" in text
    assert "▲ beyond 16 0.0 MB on the front ▲ 0.400" in text
    assert "weights + KV cache = 5,000 bytes" in text
    assert "Sent by `vllm bench serve`" in text
    assert "A good request meets ttft ≤ 500 ms." in text


def test_it_refers_to_nothing_outside_itself() -> None:
    markup = re.sub(r"<script\b.*?</script>", "", page_of(small_report()), flags=re.DOTALL)
    references = re.findall(r"""\b(?:src|href|action|url)\s*[=(]\s*["']?([^"')\s>]+)""", markup)
    assert references == ["data:,"]


def test_names_are_text() -> None:
    name = "</script><img src=x onerror=alert(1)>"
    page = page_of(small_report((name,)))
    assert name not in page
    assert "<img" not in re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)


def test_without_latency_answers_noise_and_memory() -> None:
    report = small_report(("code",))
    bare = report.model_copy(
        update={
            "latency": LatencySides(base=None, candidate=None),
            "slices": {
                "code": SliceReport(
                    quality=small_quality(1.0).model_copy(
                        update={name: None for name in type(small_quality(1.0)).model_fields if "fraction_" in name}
                        | {"answers": 0}
                    )
                )
            },
        }
    )
    text = words(page_of(bare))
    assert "Latency" not in text
    assert "Greedy answers" not in text
    assert "The base was not measured a second time" in text
    assert "base twice" not in text


def test_an_interval_that_rests_on_few_requests_says_so() -> None:
    report = small_report(("code",))
    assert "ew requests" not in words(page_of(report))
    few = ("kl_divergence_mean", "perplexity_base", "perplexity_ratio")
    quality = report.slices["code"].quality.model_copy(update={"few_requests": few})
    text = words(page_of(report.model_copy(update={"slices": {"code": SliceReport(quality=quality)}})))
    assert "[0.3000, 0.5000] few requests" in text
    assert "5.000 → 10.000 few requests" in text
    assert "[1.500, 2.500] few requests" in text
    # In the names of llama.cpp as well: half of ln 2.5 - ln 1.5.
    assert "± 0.2554 few requests" in text
    assert "fewer than 25 g²" in text
    assert text.count("few requests") == 6


def test_without_plotly_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(page_module.importlib.util, "find_spec", lambda name: None if name == "plotly" else found(name))
    written = write_report(small_report(), tmp_path / "out", overwrite=False)
    assert [path.name for path in written] == ["report.json"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_levels() -> None:
    bad, good = judge_slice(small_quality(1.0)), judge_slice(small_quality(0.01))
    assert bad.level == "beyond"
    assert [judgement.limit.name for judgement in bad.judgements[:2]] == ["kl_divergence_mean", "perplexity_ratio"]
    # Divergence 0.004 is within; the ratio 1.01 has the interval [0.7575, 1.2625] around 1.10.
    assert {judgement.limit.name: judgement.level for judgement in good.judgements} == {
        "kl_divergence_mean": "within",
        "perplexity_ratio": "unclear",
        "loop_fraction": "within",
        "empty_fraction": "within",
        "tool_call_valid_fraction": "unclear",
    }
    assert good.level == "unclear"


def test_a_rise_of_loops_is_judged_by_newcombes_interval() -> None:
    quality = small_quality(0.01, intervals=False).model_copy(
        update={
            "loop_fraction_base": 0.0,
            "loop_fraction_candidate": 0.25,
            "intervals": {
                "loop_fraction_base": (0.0, 0.1),
                "loop_fraction_candidate": (0.15, 0.4),
                "empty_fraction_base": (0.0, 0.0),
                "empty_fraction_candidate": (0.0, 0.0),
                "tool_call_valid_fraction_base": (1.0, 1.0),
                "tool_call_valid_fraction_candidate": (0.75, 0.75),
            },
        }
    )
    verdict = judge_slice(quality)
    loops = next(judgement for judgement in verdict.judgements if judgement.limit.name == "loop_fraction")
    # 0.25 - sqrt(0.10^2 + 0.10^2), 0.25 + sqrt(0.15^2 + 0)
    assert loops.ends == pytest.approx((0.25 - 0.02**0.5, 0.4))
    assert (loops.level, verdict.level) == ("beyond", "beyond")


def test_the_sentence_of_a_good_and_of_an_unsure_report() -> None:
    slices = {"a": SliceReport(quality=small_quality(0.0))}
    good = small_report().model_copy(update={"slices": slices})
    tools_lost = "tool_call_valid_fraction_candidate"
    whole = slices["a"].quality.model_copy(update={tools_lost: 1.0})
    good = good.model_copy(update={"slices": {"a": SliceReport(quality=whole)}})
    assert verdict_line(good) == (
        "No slice is surely beyond the limits, but 1 of 1 slice cannot be told from these requests: a."
    )
    sure = whole.model_copy(update={"intervals": whole.intervals | {"perplexity_ratio": (1.0, 1.0)}})
    assert verdict_line(good.model_copy(update={"slices": {"a": SliceReport(quality=sure)}})) == (
        "No slice is beyond the limits: 1 of 1 slice within."
    )
