"""The support table says what the other tests of this directory run, and for every family."""

from __future__ import annotations

from pathlib import Path

from support import HASH_ROUTED, LAYOUT_ONLY, NOT_SERVED, SERVED, rows
from tiny_families import FAMILIES

from reap_serve.architectures.resolve import known_architectures, refused_model_types, resolve

ROOT = Path(__file__).parents[3]


def test_the_table_in_the_readme_is_the_one_that_is_tested() -> None:
    text = (ROOT / "reap_serve" / "architectures" / "README.md").read_text()
    assert "\n".join(rows()) in text


def test_every_checkpoint_is_either_served_or_said_why_not() -> None:
    assert not SERVED.keys() & NOT_SERVED.keys()
    assert SERVED.keys() | NOT_SERVED.keys() == FAMILIES.keys()


def test_every_known_family_has_a_row() -> None:
    """By its own name, or by a checkpoint of one of its model types."""
    built = {resolve({"model_type": family.model_type}).model_type for family in FAMILIES.values()}
    assert built | LAYOUT_ONLY.keys() | HASH_ROUTED.keys() == known_architectures().keys()
    assert not refused_model_types().keys() & known_architectures().keys()


def test_families_without_a_checkpoint_have_published_names_or_configurations() -> None:
    text = (ROOT / "tests" / "unit" / "architectures" / "test_definitions.py").read_text()
    assert [name for name in LAYOUT_ONLY if f'"{name}"' not in text and f'"model_type": "{name}' not in text] == []
