"""The options of every front door are the fields of one dataclass; ``python tests/test_options.py`` writes them."""

import ast
import inspect
import re
import textwrap
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from lightning_scar import SCARAccelerator, SCARCheckpoint, SCARLoop
from lightning_scar.core import options as module
from lightning_scar.core.options import Options
from lightning_scar.loops.options import LoopOptions

NAMES = [field.name for field in fields(Options)]
TABLE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


def descriptions() -> dict[str, str]:
    """Return the docstring under each field, on one line."""
    (body,) = [node.body for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.ClassDef)]
    found = {}
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(below, ast.Expr), f"{field.target.id} has no docstring"
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def named(name: str, door: Any) -> str:
    return "every_n_train_steps" if (name, door) == ("every_n_steps", SCARCheckpoint) else name


def entries(door: Any) -> str:
    """Return the entries of a docstring's ``Args``."""
    wrap = textwrap.TextWrapper(120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{named(name, door)}: {text}") for name, text in descriptions().items())


def rows() -> dict[str, str]:
    """Return what the table in docs/ says of each option."""
    plain = {name: re.sub(r":\w+:`(?:~[\w.]+\.)?(\w+)`", r"`\1`", text) for name, text in descriptions().items()}
    return {named(name, SCARCheckpoint): text.replace("``", "`") for name, text in plain.items()}


def test_every_option_has_a_description() -> None:
    assert list(descriptions()) == NAMES


def test_the_callback_has_the_same_options_and_defaults() -> None:
    parameters = list(inspect.signature(SCARCheckpoint).parameters.values())[1:]
    assert [p.name for p in parameters] == [named(name, SCARCheckpoint) for name in NAMES]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters)
    assert [p.default for p in parameters] == [field.default for field in fields(Options)]
    hints, ours = get_type_hints(SCARCheckpoint.__init__), get_type_hints(Options)
    assert {name: hints[named(name, SCARCheckpoint)] for name in NAMES} == ours


def test_loops_have_the_same_options() -> None:
    assert get_type_hints(LoopOptions) == get_type_hints(Options)
    for door in (SCARLoop, SCARAccelerator):
        parameters = inspect.signature(door).parameters
        assert list(parameters)[2:] == ["continuation", "options"]
    with pytest.raises(TypeError, match="every_n_step"):
        SCARLoop("memory://options", {}, every_n_step=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("door", [SCARCheckpoint, LoopOptions])
def test_docstrings_say_the_same(door: Any) -> None:
    assert f"\n{entries(door)}\n" in inspect.getsource(door)


def test_the_table_in_docs_says_the_same() -> None:
    for name, text in rows().items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(text)} \|$", TABLE.read_text(), re.MULTILINE), name


def write() -> None:
    """Rewrite the docstrings and the table."""
    for door in (SCARCheckpoint, LoopOptions):
        path = Path(inspect.getfile(door))
        first, last = named(NAMES[0], door), NAMES[-1]
        pattern = rf"^        {first}: (?s:.*?)^        {last}: .*\n(?: {{12}}.*\n)*"
        path.write_text(re.sub(pattern, lambda _: entries(door) + "\n", path.read_text(), count=1, flags=re.MULTILINE))  # noqa: B023
    lines = TABLE.read_text().splitlines(keepends=True)
    found = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    start = next(i for i, line in enumerate(lines) if line.startswith("| `dirpath`")) + 1
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    lines[start:end] = [f"| `{name}` |{found[name].split('|')[2]}| {text} |\n" for name, text in rows().items()]
    TABLE.write_text("".join(lines))


if __name__ == "__main__":
    write()
