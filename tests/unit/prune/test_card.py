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
