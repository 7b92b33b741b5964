"""Checkpoints that several tests share."""

from __future__ import annotations

from pathlib import Path

import embedded_shape
import pytest


@pytest.fixture(scope="session")
def embedded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the embedded shape, float32."""
    directory = tmp_path_factory.mktemp("embedded")
    embedded_shape.build(directory, "float32")
    return directory
