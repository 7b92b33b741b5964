"""Whether dropped gate mass tells of traffic that moves: predicted by a plan, then measured on the pruned model.

Theory: a plan made from one domain's statistics predicts which share of the full router's gate weights falls on the
experts that it drops. The shadow router measures the same share on the pruned checkpoint. On more traffic of that
domain both agree, up to the change that pruning makes to the hidden states; on another domain the share rises, since
other experts would have been chosen.

Run: `python bench/serve_drift.py [--model DIR --traffic DIR] [--domain NAME] [--keep-fraction F]`; by default the model
and the traffic that ship with the project. Needs vLLM; about two minutes on two quiet cores.

Output: one JSON object: `planned`, the prediction for the domain; `measured`, by domain, on held-out traffic of each
with its recorded answers; `excess`, measured less planned; `threshold`, the documented alert on the excess; `alerts`,
the domains that exceed it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(*arguments: str) -> None:
    """One of our commands."""
    subprocess.run([sys.executable, "-m", "reap_serve", *arguments], check=True, stdout=subprocess.DEVNULL)


def measure(pruned: Path, traffic: Path, domains: list[str]) -> dict[str, float]:
    """Dropped gate mass of each domain on the pruned model, by its shadow router."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    from reap_serve.adapter.offline import start_engine
    from reap_serve.model import open_model
    from reap_serve.record.settings import ObserveSettings
    from reap_serve.traffic.read import read_traffic

    settings = ObserveSettings(recording=False, drift_fraction=1.0)
    llm = start_engine(open_model(str(pruned)), settings, {"max_model_len": 1024})
    from vllm import SamplingParams

    from reap_serve.adapter.renderer import EngineRenderer
    from reap_serve.traffic.teacher_forcing import TeacherForcing

    forcing = TeacherForcing(EngineRenderer(llm))
    for domain in domains:
        tokens = [
            forcing.tokens(request).token_ids for request in read_traffic([str(traffic / f"{domain}.heldout.jsonl")])
        ]
        parameters = SamplingParams(max_tokens=1, temperature=0.0, extra_args={"reap_slice": domain})
        llm.generate([{"prompt_token_ids": ids[:1000]} for ids in tokens], parameters, use_tqdm=False)
    report = llm.collective_rpc("reap_status")[0]["gate_mass"]
    assert report["refusal"] is None, report["refusal"]
    return dict(report["served"])


def main() -> None:
    from reap_serve.demo.run import demo_files
    from reap_serve.monitor.metrics import DRIFT_EXCESS

    shipped = demo_files()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=shipped.model)
    parser.add_argument("--traffic", type=Path, default=shipped.traffic)
    parser.add_argument("--domain", default="code")
    parser.add_argument("--keep-fraction", default="0.5")
    chosen = parser.parse_args()
    domains = sorted(path.name.split(".")[0] for path in chosen.traffic.glob("*.heldout.jsonl"))
    with tempfile.TemporaryDirectory() as root:
        stats, plan, pruned = Path(root, "stats.safetensors"), Path(root, "plan.json"), Path(root, "pruned")
        calibration = chosen.traffic / f"{chosen.domain}.calibration.jsonl"
        run("observe", str(chosen.model), "--slice", f"{chosen.domain}={calibration}", "--output", str(stats))
        run("plan", str(stats), "--keep-fraction", chosen.keep_fraction, "--output", str(plan))
        run("prune", str(chosen.model), str(plan), str(pruned))
        planned = json.loads(plan.read_text())["summary"]["dropped_gate_mass"][chosen.domain]
        stdout = os.dup(1)
        os.dup2(2, 1)
        measured = measure(pruned, chosen.traffic, domains)
        sys.stdout.flush()
        os.dup2(stdout, 1)
    excess = {domain: round(fraction - planned, 4) for domain, fraction in measured.items()}
    print(
        json.dumps(
            {
                "planned": {chosen.domain: round(planned, 4)},
                "measured": {domain: round(fraction, 4) for domain, fraction in measured.items()},
                "excess": excess,
                "threshold": DRIFT_EXCESS,
                "alerts": [domain for domain, value in excess.items() if value > DRIFT_EXCESS],
            }
        )
    )


if __name__ == "__main__":
    main()
