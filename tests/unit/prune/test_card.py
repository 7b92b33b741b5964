"""The model card: what the hub reads, and the numbers a reader needs."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard
from small_checkpoint import write_checkpoint, write_plan

from reap_serve.model import ModelSource
from reap_serve.prune.card import model_card
from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions, make_job
from reap_serve.records import read_json_object

KEPT = {0: [1, 3], 1: [0, 2]}


def test_the_card_of_a_model_from_the_hub(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "source")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- chat\n---\n# Base\n")
    source = ModelSource("org/Name-4E@main", directory, "abc", read_json_object(directory / "config.json"))
    plan = write_plan(tmp_path / "plan.json", KEPT)
    content = json.loads(plan.read_text())
    content["summary"] = {"tokens": 12345, "experts_kept": [2, 2]}
    plan.write_text(json.dumps(content))
    job = make_job(source, plan, PruneOptions(MtpChoice.CUT, 1 << 30, 1))
    card = ModelCard(model_card(job.manifest, source))
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["language"]) == ("org/Name-4E", "apache-2.0", ["en"])
    assert {"moe", "reap", "pruned"} <= set(data["tags"])
    assert "# Name-4E, 2 of 4 experts" in card.text
    assert "50% of the routed experts" in card.text
    assert "vllm serve" in card.text
    assert "tokens: 12345" in card.text
    # A U8 weight holds two 4-bit values: 2 norm, 8 router and 4 * 36 expert parameters in each of 2 layers, and 4 more.
    before, after = job.manifest.parameters_before, job.manifest.parameters_after
    assert (before.total, before.active) == (2 * (2 + 8 + 144) + 4, 2 * (2 + 8 + 72) + 4)
    assert (after.total, after.active) == (2 * (2 + 4 + 72) + 4, 2 * (2 + 4 + 72) + 4)


def test_a_local_source_claims_no_base_model(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "source")
    source = ModelSource(str(directory), directory, None, read_json_object(directory / "config.json"))
    job = make_job(source, write_plan(tmp_path / "plan.json", KEPT), PruneOptions(MtpChoice.CUT, 1 << 30, 1))
    text = model_card(job.manifest, source)
    assert "base_model" not in text
    assert str(directory) not in text
    assert "# source, 2 of 4 experts" in text


def card_of(folder: Path, **changes: object) -> str:
    """The card of a plan with other provenance, summary or criterion."""
    directory = write_checkpoint(folder / "my_model-4E")
    source = ModelSource(str(directory), directory, None, read_json_object(directory / "config.json"))
    plan = write_plan(folder / "plan.json", KEPT)
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **changes}))
    return model_card(make_job(source, plan, PruneOptions(MtpChoice.CUT, 1 << 30, 1)).manifest, source)


def test_the_statistics_behind_the_plan_in_numbers(tmp_path: Path) -> None:
    observed = {"requests": 1200, "tokens": {"customer-a": 30000, "customer-b": 2500, "customer-c": 400}}
    text = card_of(tmp_path, provenance={"observed": observed, "tool": "reap-serve 0.2.0", "python": "3.11"})
    assert "- 32,900 tokens of 1,200 requests, in 3 slices: from 400 to 30,000 tokens in each\n" in text
    assert "customer" not in text
    assert "- tool: reap-serve 0.2.0\n" in text
    assert "python" not in text


def test_what_stays_of_the_saliency(tmp_path: Path) -> None:
    """A plan of 0.1.0: its own predictions, and nothing of tokens, which it does not count."""
    old = json.loads((Path(__file__).parents[1] / "plan" / "written" / "0.1.0.json").read_text())
    retained = old["summary"]["retained_saliency"]
    text = card_of(tmp_path, summary=old["summary"], provenance=old["provenance"])
    worst = min(retained["slices"].values())
    line = f"saliency by `reap` of the experts that stay: {retained['mixture']:.1%}, {worst:.1%} of the slice that"
    assert line in text
    assert "tokens" not in text


def test_one_slice_and_no_requests(tmp_path: Path) -> None:
    text = card_of(tmp_path, provenance={"observed": {"requests": 0, "tokens": {"default": 7000}}})
    assert "- 7,000 tokens, in one slice\n" in text


def test_a_plan_that_says_nothing(tmp_path: Path) -> None:
    text = card_of(tmp_path, provenance={"observed": {"tokens": "many"}})
    assert "The plan states nothing of its traffic." in text


def test_text_that_is_not_ours_is_no_markup(tmp_path: Path) -> None:
    text = card_of(tmp_path, criterion="<b>`*best*`\n# [x](y)", summary={"a|b": "`code`", "_c_": "my_slice"})
    assert "were dropped by `<b>'*best*'\\n# [x](y)` with" in text
    assert "- a\\|b: \\`code\\`\n" in text
    assert "-  c : my_slice\n" in text
    assert "# my_model-4E, 2 of 4 experts" in text
