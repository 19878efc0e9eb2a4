"""A Python program, as its command line names it: what to import for it, and how to run it as ``__main__``."""

import builtins
import os
import runpy
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

#: Options of Python that take a value, in the next word if it is not in the same one.
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
#: Options of one letter that another one may follow in the same word.
_FLAGS = frozenset("bBdEhiIOPqsSuvx")


@dataclass(frozen=True)
class Program:
    """What Python is asked to run.

    Args:
        flags: The options of Python itself.
        kind: ``"-m"``, ``"-c"`` or ``"script"``.
        what: The module, the code, or the path.
        arguments: What follows.

    Example::

        >>> Program.of(["python", "-u", "train.py", "--lr", "0.1"])
        Program(flags=('-u',), kind='script', what='train.py', arguments=('--lr', '0.1'))
        >>> Program.of(["python"]) is None
        True

    """

    flags: tuple[str, ...]
    kind: str
    what: str
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, command: Sequence[str]) -> "Program | None":
        """Return the program of a command line; ``None`` if it names none, e.g. to read it from standard input."""
        flags, rest = list[str](), list(command[1:])
        while rest and rest[0].startswith("-") and len(rest[0]) > 1:
            word = rest.pop(0)
            letters, kind = word[1:-1], f"-{word[-1]}"
            if kind in ("-m", "-c") and _FLAGS.issuperset(letters):
                flags += [f"-{letter}" for letter in letters]
                return cls(tuple(flags), kind, rest[0], tuple(rest[1:])) if rest else None
            flags.append(word)
            if word in _WITH_VALUE:
                if not rest:
                    return None
                flags.append(rest.pop(0))
            elif not word.startswith(_WITH_VALUE) and not _FLAGS.issuperset(word[1:]):
                return None
        if not rest or rest[0] == "-" or Path(rest[0]).is_dir():
            return None
        return cls(tuple(flags), "script", rest[0], tuple(rest[1:]))

    @property
    def words(self) -> list[str]:
        """Its command line, without Python and its options."""
        return [*([self.kind] if self.kind != "script" else []), self.what, *self.arguments]

    @property
    def path(self) -> str | None:
        """The directory that Python puts in front of ``sys.path`` for it; ``None`` for none."""
        if getattr(sys.flags, "safe_path", False) or sys.flags.isolated:
            return None
        if self.kind == "script":
            return os.path.dirname(os.path.realpath(self.what))
        return os.getcwd() if self.kind == "-m" else ""

    @property
    def file(self) -> Path | None:
        """The file of its main module, if it has one; found without importing its packages."""
        if self.kind == "script":
            return Path(self.what)
        return file_of(f"{self.what}.__main__") or file_of(self.what) if self.kind == "-m" else None

    def run(self) -> None:
        """Run it in this process, in the place of the program that this process began with."""
        sys.orig_argv = [sys.executable, *self.flags, *self.words]
        sys.argv = ["-c" if self.kind == "-c" else self.what, *self.arguments]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__builtins__ = builtins  # type: ignore[attr-defined]
        if self.kind == "-m":
            # What `python -m` calls itself.
            runpy._run_module_as_main(self.what)  # type: ignore[attr-defined]
        elif self.kind == "-c":
            exec(compile(self.what, "<string>", "exec"), vars(main))
        else:
            main.__file__ = os.path.abspath(self.what)
            main.__loader__ = SourceFileLoader("__main__", main.__file__)
            main.__cached__ = None  # type: ignore[attr-defined]
            exec(compile(Path(self.what).read_bytes(), main.__file__, "exec"), vars(main))


def file_of(module: str) -> Path | None:
    """Return the file of a module, found without importing anything; ``None`` if it has none, or is not there."""
    where: list[str] | None = None
    origin, parts = None, module.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), where)
        if spec is None:
            return None
        where, origin = list(spec.submodule_search_locations or []), spec.origin
    return Path(origin) if origin is not None else None
