"""Checkpoints that several tests share."""

from __future__ import annotations

from pathlib import Path

import embedded_shape
import pytest
import served_families


@pytest.fixture(scope="session")
def embedded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the embedded shape, float32."""
    directory = tmp_path_factory.mktemp("embedded")
    embedded_shape.build(directory, "float32")
    return directory


@pytest.fixture(scope="session")
def four_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each of `served_families.FOUR`, in a folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in served_families.FOUR.items():
        served_families.build(family, folder / name)
    return folder
