"""What a table of a release is made of: the names of vLLM that this program uses, and where they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class ClassNames:
    """A class, and what is read, called or replaced of it.

    Attributes:
        module: Where it is defined, or imported from.
        name: Of the class.
        attributes: Read or set: of the class, of its instances, or of a class that it derives from.
        methods: Parameters that we pass or read, by method; the method's own list begins with them.
    """

    module: str
    name: str
    attributes: tuple[str, ...] = ()
    methods: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionNames:
    """A function of a module, and the parameters that its list begins with."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ValueName:
    """Something else that a module holds."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class TextName:
    """A string that a module hands to a registry: an operator's or a weight's name, which no attribute declares."""

    module: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class ModuleName:
    """A module that is run as a program."""

    module: str


Entry = ClassNames | FunctionNames | ValueName | TextName | ModuleName


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """A release of vLLM.

    Attributes:
        version: Major and minor.
        names: All that is used of it.
        tested: Whether the tests run it; the names of the others are checked against their sources alone.
    """

    version: str
    names: tuple[Entry, ...]
    tested: bool = True

    @property
    def patches(self) -> str:
        """Folder of its patches, below the repository."""
        return f"patches/vllm-{self.version}"

    def derive(
        self, version: str, *, moved: Mapping[str, str] | None = None, added: Sequence[Entry] = (), tested: bool = True
    ) -> Release:
        """Another release, told by its differences from this one.

        Args:
            version: Major and minor.
            moved: Other modules, by the name that moved there.
            added: Names that only the other release has.
            tested: See `Release`.
        """
        elsewhere = dict(moved or {})
        names = []
        for entry in self.names:
            module = None if isinstance(entry, TextName | ModuleName) else elsewhere.pop(entry.name, None)
            names.append(entry if module is None else dataclasses.replace(entry, module=module))
        assert not elsewhere, f"no entry is called {', '.join(elsewhere)}"
        return Release(version, (*names, *added), tested)

    def module_of(self, name: str) -> str:
        """Where a class, function or value stands in this release.

        Raises:
            KeyError: The table has no such name.
        """
        for entry in self.names:
            if not isinstance(entry, TextName | ModuleName) and entry.name == name:
                return entry.module
        raise KeyError(name)
