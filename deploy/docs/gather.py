"""Gathers the pages of the site: every README at its own place, the commands' help, and the API.

`python deploy/docs/gather.py DIRECTORY` writes them. READMEs keep their paths, so that links between them hold; a link
to a file that is no page becomes that file's name. Checked by: tests/unit/deploy/test_docs.py.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURES = (".png", ".svg")
# What a program may import; everything else may change in any release.
PUBLIC = (
    "reap_serve.statistics.record",
    "reap_serve.statistics.file",
    "reap_serve.statistics.merge",
    "reap_serve.statistics.saliency",
    "reap_serve.plan.record",
    "reap_serve.plan.request",
    "reap_serve.plan.decision",
    "reap_serve.plan.planner",
    "reap_serve.prune.run",
    "reap_serve.prune.verify",
    "reap_serve.architectures.resolve",
    "reap_serve.errors",
)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def pages() -> list[Path]:
    """Markdown files of the repository that become pages."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [Path(name) for name in listed.stdout.splitlines()]
    return [name for name in names if name.parts[0] not in ("tests", ".github") and (ROOT / name).is_file()]


def gather(directory: Path) -> None:
    """Writes all pages and their pictures."""
    known = set(pages())
    for page in sorted(known):
        target = directory / page
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_LINK.sub(functools.partial(_kept, page, known), (ROOT / page).read_text()))
        for picture in _pictures(page):
            (target.parent / picture).parent.mkdir(parents=True, exist_ok=True)
            (target.parent / picture).write_bytes((ROOT / page.parent / picture).read_bytes())
    (directory / "commands.md").write_text("\n".join(_commands()))
    (directory / "api.md").write_text("# API\n\n" + "\n".join(f"::: {module}\n" for module in PUBLIC))


def _kept(page: Path, known: set[Path], link: re.Match[str]) -> str:
    picture, text, target = link[1], link[2], link[3]
    if picture or "://" in target or target.startswith("mailto:"):
        return link[0]
    place = Path(os.path.normpath(page.parent / target))
    if place in known:
        return link[0]
    if place / "README.md" in known:
        return f"[{text}]({target.rstrip('/')}/README.md{link[4] or ''})"
    return text if text.startswith("`") else f"`{text}`"


def _pictures(page: Path) -> list[str]:
    found = [link[3] for link in _LINK.finditer((ROOT / page).read_text()) if link[1]]
    return [name for name in found if name.endswith(PICTURES) and "://" not in name]


def _commands() -> Iterator[str]:
    """The help of every command, as the program prints it."""
    import typer
    from typer.core import TyperGroup

    from reap_serve.cli.app import _register, app

    _register()
    program = typer.main.get_command(app)
    assert isinstance(program, TyperGroup)
    yield "# Commands\n"
    yield from _command(["reap-serve"], program)


def _command(words: list[str], command: object) -> Iterator[str]:
    from typer.core import TyperGroup

    text = subprocess.run(
        [sys.executable, "-m", "reap_serve", *words[1:], "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    yield f"## {' '.join(words)}\n\n```text\n{text.strip()}\n```\n"
    if isinstance(command, TyperGroup):
        for name, child in command.commands.items():
            if not (words[-1] == "plan" and name == "make"):
                yield from _command([*words, name], child)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
