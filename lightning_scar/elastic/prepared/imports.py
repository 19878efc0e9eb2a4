"""What a program imports, read from its source: nothing of the user's runs."""

import ast
import os
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lightning_scar.elastic.prepared.program import Program, file_of

#: Who imports the first imports the others while training.
_COMPANIONS = {
    # The compiler is imported when the first optimizer is made.
    "torch": ["torch.distributed", "torch._dynamo"],
    "lightning": ["lightning.pytorch", "lightning_scar.lightning.strategy", "lightning_scar.lightning.checkpoint"],
    "accelerate": ["lightning_scar.loops.accelerate"],
    "lightning_scar": ["lightning_scar.loops.continuation"],
}

#: How many files of the user's own are read. What only later ones import is known when a worker trains.
_MOST_FILES = 100


class NotPreparedError(Exception):
    """A program's workers cannot be forked from a process that has imported what they need. The message says why."""


class Imports:
    """The modules that a program imports at its beginning, and the variables that it sets before.

    Modules of the user's own, beside the script or on ``PYTHONPATH``, are read, not named: to import them would run
    the user's code.

    Args:
        program: The program.

    Raises:
        NotPreparedError: If it changes the environment before an import, in a way that only running it would tell.

    """

    def __init__(self, program: Program) -> None:
        #: The names of installed modules, in the order of their imports.
        self.modules: list[str] = []
        #: What the program sets before it imports any of them.
        self.environment: dict[str, str] = {}
        self._read: set[Path] = set()
        self._changed = ""
        before, path, file = sys.path[:], program.path, program.file
        sys.path[:0] = [path] if path is not None else []
        try:
            if file is not None and is_installed(file):
                self._add(program.what)
            elif file is not None:
                self._read_file(file)
            self._add("torch")
        finally:
            sys.path[:] = before

    def _add(self, name: str) -> None:
        file, first = file_of(name), name.partition(".")[0]
        if file is None or first in sys.stdlib_module_names:
            return
        if not is_installed(file):
            self._read_file(file)
            return
        if self._changed:
            raise NotPreparedError(f"{self._changed} before it imports {name}")
        self.modules += [name for name in (name, *_COMPANIONS.get(first, [])) if name not in self.modules]

    def _read_file(self, file: Path) -> None:
        if file in self._read or file.suffix != ".py" or len(self._read) == _MOST_FILES:
            return
        self._read.add(file)
        try:
            body = ast.parse(file.read_bytes()).body
        except (OSError, SyntaxError, ValueError):
            return  # The workers report it.
        for node in _statements(body):
            match node:
                case ast.Import():
                    for alias in node.names:
                        self._add(alias.name)
                case ast.ImportFrom(level=0, module=str(module)):
                    self._add(module)
                    for alias in node.names:
                        self._add_own(f"{module}.{alias.name}")
                case ast.ImportFrom():
                    package = file.parents[node.level - 1]
                    names = [node.module] if node.module else [alias.name for alias in node.names]
                    for name in names:
                        place = package.joinpath(*name.split("."))
                        self._read_file(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
                case _:
                    self._note_environment(node, file, is_certain=node in body)

    def _add_own(self, name: str) -> None:
        """Read what may be a module of the user's own, or just a name in one."""
        file = file_of(name)
        if file is not None and not is_installed(file):
            self._read_file(file)

    def _note_environment(self, node: ast.stmt, file: Path, is_certain: bool) -> None:
        """Note what a statement does to the environment, which an import behind it may read."""
        if not any(map(_changes_environment, ast.walk(node))):
            return
        name, value = _literal(node)
        if name in os.environ and os.environ[name] == value:
            return
        if name and is_certain and not self.modules:
            self.environment[name] = value
        else:
            self._changed = f"{file.name}, line {node.lineno}, changes the environment"


def is_installed(file: Path) -> bool:
    """Return whether a module's file is of Python, an installed package or this one, not the user's own."""
    where = file.resolve()
    own = [*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")), str(Path(__file__).parents[2])]
    return any(where.is_relative_to(folder) for folder in (*map(_resolved, own), *_installed_folders(tuple(sys.path))))


@cache
def _installed_folders(path: tuple[str, ...]) -> list[Path]:
    """Return those of a search path to which packages were installed."""
    return [_resolved(folder) for folder in path if next(Path(folder).glob("*.dist-info"), None) is not None]


@cache
def _resolved(folder: str) -> Path:
    return Path(folder).resolve()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run when a module is imported, but for those of functions and classes."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                yield from _statements(node.orelse)
            case ast.If() | ast.Try() | ast.With() | ast.For() | ast.While():
                for field in ("body", "orelse", "finalbody"):
                    yield from _statements(getattr(node, field, []))
            case _:
                yield node


def _changes_environment(node: ast.AST) -> bool:
    match node:
        case ast.Subscript(value=where, ctx=ast.Store() | ast.Del()):
            return _is_environ(where)
        case ast.Call(func=ast.Attribute(value=where, attr="setdefault" | "update" | "pop" | "clear")):
            return _is_environ(where)
        case ast.Call(func=ast.Attribute(attr="putenv" | "unsetenv")):
            return True
        case ast.AugAssign(target=where):
            return _is_environ(where)
    return False


def _literal(node: ast.stmt) -> tuple[str, str]:
    """Return the variable that a statement sets and its value, where both are written out; else two empty strings."""
    match node:
        case ast.Assign(
            targets=[ast.Subscript(slice=ast.Constant(value=str(name)))], value=ast.Constant(value=str(value))
        ):
            return name, value
        case ast.Expr(
            ast.Call(
                func=ast.Attribute(attr="setdefault"),
                args=[ast.Constant(value=str(name)), ast.Constant(value=str(value))],
            )
        ):
            return name, os.environ.get(name, value)
    return "", ""


def _is_environ(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )
