"""Which experts llm-compressor's REAPPruningModifier retains of the embedded model, as a fixture for the tests.

Theory. The modifier (0.14) means g|f| over the tokens routed to an expert, with the gates that the model applies, as
`--criterion reap` does, and keeps E - int(E * sparsity) experts. The pipeline is `basic`: all layers observe the whole
model, as this project does. Under the default, `sequential`, a layer is pruned before the next is observed, and with
these releases already the first layer routed 3 % of the tokens otherwise than transformers does on the same ids: its
routed tokens are not the same.

Run, in a virtual environment of its own, since llm-compressor pins other releases than vLLM:

    python -m venv VENV && VENV/bin/pip install llmcompressor==0.14.0.1
    PYTHONPATH=. VENV/bin/python bench/plan_oracles.py

Output: tests/integration/plan/llmcompressor_retained.json, {"weights_sha256", "packages": {...}, "cases": [{"domain",
"sparsity", "retained": [[ids by layer]]}]}, and a line for each case.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
ORACLE_TESTS = TESTS / "integration" / "plan"
sys.path[:0] = [str(ORACLE_TESTS), str(TESTS)]

from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier  # noqa: E402
from routed_tokens import DIRECTORY, SEQUENCE_TOKENS, load_model, token_ids  # noqa: E402

from reap_serve.model import fingerprint, open_model  # noqa: E402

CASES = (("code", 0.25), ("code", 0.5), ("arithmetic", 0.5), ("tools", 0.5))


def retained(domain: str, sparsity: float) -> list[list[int]]:
    """Retained experts by layer."""
    rows = token_ids(domain).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * SEQUENCE_TOKENS for _ in rows]})
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "retained.json"
        oneshot(
            model=load_model(),
            dataset=dataset,
            recipe=REAPPruningModifier(sparsity=sparsity, report_path=str(report)),
            max_seq_length=SEQUENCE_TOKENS,
            num_calibration_samples=len(rows),
            moe_calibrate_all_experts=False,
            pipeline="basic",
        )
        by_layer: dict[str, list[int]] = json.loads(report.read_text())
    layers = {int(name.split(".layers.")[1].split(".")[0]): sorted(ids) for name, ids in by_layer.items()}
    return [layers[index] for index in sorted(layers)]


def main() -> None:
    """Writes the fixture."""
    cases = []
    for domain, sparsity in CASES:
        cases.append({"domain": domain, "sparsity": sparsity, "retained": retained(domain, sparsity)})
        print(json.dumps(cases[-1]))
    fixture = {
        "weights_sha256": fingerprint(open_model(str(DIRECTORY / "model"))).weights_sha256,
        "packages": {
            name: metadata.version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")
        },
        "cases": cases,
    }
    (ORACLE_TESTS / "llmcompressor_retained.json").write_text(json.dumps(fixture) + "\n")


if __name__ == "__main__":
    main()
