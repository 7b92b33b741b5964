"""Modules of the patched files, loaded beside the installed ones."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def load_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Loads a module from a copy with a patch applied; what it does not define comes from the installed vLLM."""

    def load(patch_name: str, module_path: str) -> ModuleType:
        from patched_vllm import RELEASE, patched_files
        from vllm.model_executor import custom_op

        # The installed one and what it imports come first: a second registration of the same layers is refused.
        importlib.import_module(module_path.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(custom_op, "op_registry", {})
        file = patched_files(RELEASE / patch_name, tmp_path) / module_path
        package = module_path.rpartition("/")[0].replace("/", ".")
        spec = importlib.util.spec_from_file_location(f"{package}.patched_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
