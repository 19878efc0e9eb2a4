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

#: Options of Python without a value.
_FLAGS = frozenset("bBdEiIOPqsSuvx")


@dataclass(frozen=True)
class Program:
    """What Python is asked to run.

    Args:
        command: All the words of the command line.
        flags: The options of Python itself.
        kind: ``"-m"``, ``"-c"`` or ``"script"``.
        what: The module, the code, or the path.
        arguments: What follows.

    Example::

        >>> program = Program.of(["python", "-Bu", "train.py", "--lr", "0.1"])
        >>> program.flags, program.what, program.arguments
        (('-B', '-u'), 'train.py', ('--lr', '0.1'))

    """

    command: tuple[str, ...]
    flags: tuple[str, ...]
    kind: str
    what: str
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, command: Sequence[str]) -> "Program | None":
        """Return the program of a command line; ``None`` if it names none, e.g. to read it from standard input."""
        flags, rest = list[str](), list(command[1:])
        while rest and rest[0].startswith("-"):
            word = rest.pop(0)
            if word == "--check-hash-based-pycs" and rest:
                flags += [word, rest.pop(0)]
                continue
            if word == "-" or word.startswith("--"):
                return None
            for place, letter in enumerate(word[1:], start=2):
                if letter in "mcWX":
                    value = word[place:] or (rest.pop(0) if rest else "")
                    if letter in "mc":
                        return cls(tuple(command), tuple(flags), f"-{letter}", value, tuple(rest)) if value else None
                    flags += [f"-{letter}", value]
                    break
                if letter not in _FLAGS:
                    return None
                flags.append(f"-{letter}")
        if not rest or Path(rest[0]).is_dir():
            return None
        return cls(tuple(command), tuple(flags), "script", rest[0], tuple(rest[1:]))

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
        sys.orig_argv = list(self.command)
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
            exec(compile(_read(main.__file__), main.__file__, "exec"), vars(main))


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        # Python's own words and exit code.
        print(f"{sys.executable}: can't open file {file!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        sys.exit(2)


def file_of(module: str) -> Path | None:
    """Return the file of a module, found without importing anything; ``None`` if it has none, or is not there."""
    where: list[str] | None = None
    origin, parts = None, module.split(".")
    for count in range(1, len(parts) + 1):
        try:
            spec = PathFinder.find_spec(".".join(parts[:count]), where)
        except (ImportError, KeyError, ValueError):
            return None  # It lies in a namespace package, which is found when that is imported.
        if spec is None:
            return None
        where, origin = list(spec.submodule_search_locations or []), spec.origin
    return Path(origin) if origin is not None else None
