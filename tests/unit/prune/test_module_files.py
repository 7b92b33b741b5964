"""Names of modules in the files beside the weights: a cut renames them there, and verify finds those of no expert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from odd_checkpoint import BOTH, CONFIG, L0, L1, dense, plan, trunk, write

from reap_serve.prune.decide import MtpChoice
from reap_serve.prune.job import PruneOptions
from reap_serve.prune.run import prune
from reap_serve.prune.verify import verify
from reap_serve.records import JsonValue

OPTIONS = PruneOptions(MtpChoice.CUT, 1 << 30, 1)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_configurations_beside_the_model_are_rewritten_and_verified(file: str, tmp_path: Path) -> None:
    quantisation = {"quant_method": "x", "exclude": BOTH}
    config = {**CONFIG, "quantization_config": quantisation} if file == "config.json" else CONFIG
    source = write(tmp_path / "model", config, {**dense(), **trunk()})
    if file != "config.json":
        (source / file).write_text(json.dumps(quantisation))
    prune(str(source), plan(tmp_path / "plan.json"), tmp_path / "out", OPTIONS, overwrite=False)
    written = json.loads((tmp_path / "out" / file).read_text())
    assert written.get("quantization_config", written)["exclude"] == [f"{L0}.2.up_proj"]
    assert verify(tmp_path / "out", str(source), None).findings == ()


@pytest.mark.parametrize(
    ("quantisation", "severity"),
    [
        ({"exclude": [f"{L0}.4.up_proj"]}, "error"),
        ({"layer_quant_config": {f"{L0}.5": {"bits": 8}}}, "error"),
        ({"a": {"b": [[f"-:{L1}.7.up_proj"]]}}, "error"),
        ({"modules_to_not_convert": ["experts.6"]}, "error"),
        ({"ignore": [r"re:.*\.6\.up_proj"]}, "error"),
        ({"ignore": ["*.experts.(5|6).*", r"re:.*experts\.(5|6)\..*"]}, "error"),
        ({"ignore": [r"re:.*experts\.(2|6)\..*"]}, "warning"),
        ({"ignore": ["re:.*experts.3.*", r"re:.*experts\.[0-9]\..*"]}, None),
        ({"ignore": [r"re:.*experts\.\d+\..*", "*.experts.*", f"{L0}.3.up_proj", "experts.0", "lm_head"]}, None),
    ],
)
def test_verify_finds_names_of_experts_that_do_not_exist(
    quantisation: JsonValue, severity: str | None, tmp_path: Path
) -> None:
    config = {**CONFIG, "num_experts": 4, "quantization_config": quantisation}
    output = write(tmp_path / "out", config, {**dense(), **trunk(experts=4)})
    found = [each.severity for each in verify(output, None, None).findings if each.check == "quantization"]
    assert found == ([] if severity is None else [severity])
