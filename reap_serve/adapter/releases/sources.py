"""What vLLM's sources define, read without importing them: so a release that does not run here can be checked, too.

Reading all files that a table names takes about a second; importing them would load most of vLLM.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign


class MissingNameError(LookupError):
    """The sources define no such name."""


@dataclass(frozen=True, slots=True)
class Module:
    """A parsed file.

    Attributes:
        name: Dotted.
        definitions: By name, those under `if`, `try` and `with` included.
        imports: Module and name (None for a whole module) by local name.
        text: Of the file.
    """

    name: str
    definitions: Mapping[str, Definition]
    imports: Mapping[str, tuple[str, str | None]]
    text: str


@dataclass(frozen=True, slots=True)
class Members:
    """What a class and the classes that it derives from define.

    Attributes:
        methods: Parameters by method, those after `*` included.
        attributes: Everything else: fields, properties, what methods set on `self`.
    """

    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.methods or name in self.attributes


class Sources:
    """The Python files below one folder.

    Args:
        root: The folder that holds `vllm`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, Module] = {}

    def module(self, name: str) -> Module:
        """A module by its dotted name.

        Raises:
            MissingNameError: There is no such file.
        """
        if name not in self._modules:
            base = self._root.joinpath(*name.split("."))
            path = next((each for each in (base.with_suffix(".py"), base / "__init__.py") if each.exists()), None)
            if path is None:
                raise MissingNameError(f"there is no module {name}")
            self._modules[name] = _parsed(name, path)
        return self._modules[name]

    def find(self, module_name: str, name: str) -> tuple[Module, Definition]:
        """The definition of a name, and where it is: imports are followed.

        Raises:
            MissingNameError: Nothing of that name is defined.
        """
        seen = set()
        while (module_name, name) not in seen:
            seen.add((module_name, name))
            module = self.module(module_name)
            if name in module.definitions:
                return module, module.definitions[name]
            if name not in module.imports or module.imports[name][1] is None:
                break
            module_name, name = module.imports[name]  # type: ignore[assignment]
        raise MissingNameError(f"{module_name} has no {name}")

    def members(self, module_name: str, class_name: str) -> Members:
        """What a class has, its base classes within the sources included.

        Raises:
            MissingNameError: There is no such class.
        """
        members = Members()
        self._collect(module_name, class_name, members)
        return members

    def _collect(self, module_name: str, class_name: str, members: Members) -> None:
        module, node = self.find(module_name, class_name)
        if not isinstance(node, ast.ClassDef):
            raise MissingNameError(f"{module_name}.{class_name} is no class")
        for statement in _flat(node.body):
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                if any("property" in ast.unparse(each) for each in statement.decorator_list):
                    members.attributes.add(statement.name)
                else:
                    # A derived class comes first, and its definition counts.
                    members.methods.setdefault(statement.name, parameters_of(statement))
                members.attributes.update(_set_on_self(statement))
            else:
                members.attributes.update(_targets(statement))
        for base in node.bases:
            found = self._resolved(module, base)
            if found is not None:
                self._collect(*found, members)

    def _resolved(self, module: Module, base: ast.expr) -> tuple[str, str] | None:
        """Module and name of a base class; None when it is not among the sources."""
        if isinstance(base, ast.Subscript):
            base = base.value
        if isinstance(base, ast.Name):
            found = (module.name, base.id)
        elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id in module.imports:
            owner, part = module.imports[base.value.id]
            found = (owner if part is None else f"{owner}.{part}", base.attr)
        else:
            return None
        try:
            _, definition = self.find(*found)
        except MissingNameError:
            return None
        return found if isinstance(definition, ast.ClassDef) else None


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...]:
    """Names of a function's parameters in order, `*` and `**` left out."""
    arguments = node.args
    return tuple(each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))


def _parsed(name: str, path: Path) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    definitions: dict[str, Definition] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    for statement in _flat(tree.body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            definitions.update(dict.fromkeys(_targets(statement), statement))
        elif isinstance(statement, ast.Import):
            imports.update({each.asname or each.name.partition(".")[0]: (each.name, None) for each in statement.names})
        elif isinstance(statement, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - statement.level + 1])
            source = statement.module or "" if statement.level == 0 else f"{parent}.{statement.module or ''}".strip(".")
            imports.update({each.asname or each.name: (source, each.name) for each in statement.names})
    return Module(name, definitions, imports, text)


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those under `if`, `try` and `with`."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With | ast.ExceptHandler):
                yield from _flat(vars(statement).get(part, []))


def _targets(statement: ast.stmt) -> set[str]:
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names = (node for target in targets for node in ast.walk(target))
    return {node.id for node in names if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _set_on_self(function: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
