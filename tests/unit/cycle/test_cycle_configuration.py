"""A configuration of the loop: what is wrong in it is named by its key before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from cycle_world import World

from reap_serve.cycle import steps
from reap_serve.cycle.config import read_config
from reap_serve.cycle.keys import with_keys
from reap_serve.cycle.run import run_cycle
from reap_serve.errors import EngineError, InputFileError, PlanError, ReapServeError, RequestError, TrafficError


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("keep_experts = 2", "", InputFileError, "exactly one of"),
        ("keep_experts = 2", 'keep_experts = 2\nlimits = ["a<1"]', InputFileError, "exactly one of"),
        ('since = "7d"', 'since = "soon"', InputFileError, "no duration"),
        ("keep_experts = 2", 'limits = ["slices.*.quality.perplexity_ratio<2"]', InputFileError, r"traffic\.choose"),
        ("keep_experts = 2", 'keep_experts = 2\nbudget = "a while"', InputFileError, "no budget"),
        ("[gates]", "[gate]", InputFileError, r"unknown key gate \(2 problems\); the keys there are model, .* gates,"),
        (
            "since =",
            "sinse =",
            InputFileError,
            r"toml: unknown key statistics\.sinse; the keys there are paths,",
        ),
        ("kl_divergence_mean<0.2", "kl<0.2", RequestError, r"cycle\.toml: gates\.trial 'slices\.\*\.quality\.kl<0\.2'"),
        (
            "[gates]",
            '[gates]\ncheckpoint = ["a<1"]',
            RequestError,
            r"cycle\.toml: gates\.checkpoint 'a<1': the rep",
        ),
        ("[gates]", '[gates]\ncheckpoint = ["a"]', RequestError, r"cycle\.toml: gates\.checkpoint 'a' is not PATH"),
        (
            "[gates]",
            'criterion = "nix"\n[gates]',
            InputFileError,
            r"choose\.criterion: there is no .* one of reap,",
        ),
        ("[gates]", '[drift]\ncriterion = "nix"\n[gates]', InputFileError, r"drift\.criterion: there is no criterion"),
        ('state = "state"', 'state = "base"', InputFileError, "state: .*base is the folder of a model"),
        ('paths = ["stats"]', 'paths = ["stats", "stat"]', InputFileError, "statistics .*/stat does not exist"),
        ('heldout = ["heldout.jsonl"]', 'heldout = ["gone.jsonl"]', RequestError, "gone.jsonl"),
        ("model", "model = = ", InputFileError, "is not TOML"),
    ],
)
def test_a_wrong_configuration_is_named_before_anything_starts(
    world: World, old: str, new: str, error: type[Exception], message: str
) -> None:
    text = world.config.read_text()
    assert old in text
    world.config.write_text(text.replace(old, new, 1))
    with pytest.raises(error, match=message):
        run_cycle(world.config)
    assert world.engine_calls == []


def test_a_malformed_line_names_the_key_that_passes_over_it(world: World) -> None:
    with (world.root / "heldout.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(TrafficError, match=r"or skip such lines with skip_malformed = true under \[traffic\]$"):
        run_cycle(world.config)
    world.config.write_text(world.config.read_text().replace("[traffic]", "[traffic]\nskip_malformed = true"))
    assert "no statistics" in run_cycle(world.config).reason
    assert steps.settings_of(read_config(world.config), latency=False).refusals.skip


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RequestError("--limit 'x<1' was not measured", "leave it out"), "c.toml: choose.limits 'x<1' was not"),
        (RequestError("too small", "raise --budget, or give less"), "too small; raise choose.budget, or give less"),
        (PlanError("no count", "relax --multiple-of or --moe-backend"), "relax choose.multiple_of or --moe-backend"),
        (EngineError("vLLM did not start: x", "see the log above, or add --debug"), "or add --debug"),
    ],
)
def test_errors_name_keys(error: ReapServeError, expected: str) -> None:
    named = with_keys(error, Path("c.toml"))
    assert type(named) is type(error)
    assert expected in str(named)
