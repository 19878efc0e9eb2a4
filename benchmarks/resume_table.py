"""What of a resumed run is as in an undisturbed one: ``python -m benchmarks.resume_table --json OUT``.

In each situation, and through each front door, real processes train, die by real signals, and are started again by the
same command. What they did and what they ended with is compared with a run that nobody disturbed, first with
``lightning-scar``, then with the checkpoints of the framework: Lightning's ``ModelCheckpoint``, Accelerate's
``save_state`` with ``skip_first_batches``, ``Fabric.save``. The data come in order, so that those can place them;
``benchmarks.samples`` tells of shuffled data.
"""

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any, NamedTuple

import torch

from benchmarks import kills, processes, report
from benchmarks.report import Target
from benchmarks.resume_training import BATCH, BATCHES, Asked, train

#: The front doors, and the number of ranks.
DOORS = {"Trainer": 1, "ddp": 2, "scar_ddp": 2, "Accelerate": 1, "Fabric": 1}
TRAINERS, LOOPS = ("Trainer", "ddp", "scar_ddp"), ("Accelerate", "Fabric")
_STEPS = 2 * BATCHES
#: Seconds for a job.
_LIMIT = 120.0


@dataclass(frozen=True)
class Situation:
    """A way in which a run is disturbed.

    Attributes:
        dies: Where its processes die, in turn; see :class:`~benchmarks.resume_training.Asked`.
        options: Of all processes.
        then: Options of the last one only.
        whole: Options of the undisturbed run, if not those of the last process.
        doors: Where it can happen.
        served_once: Whether only that is compared, whichever rank serves a sample: there is another number of ranks.
        tells: What a cell tells besides: ``"code"`` of the disturbed processes, ``"again"`` for steps made twice.

    """

    dies: tuple[tuple[str, int, str], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    then: dict[str, Any] = field(default_factory=dict)
    whole: dict[str, Any] | None = None
    doors: tuple[str, ...] = (*TRAINERS, *LOOPS)
    served_once: bool = False
    tells: tuple[str, ...] = ()


def _killed(*places: tuple[str, int]) -> tuple[tuple[str, int, str], ...]:
    return tuple((where, number, "SIGKILL") for where, number in places)


_IN_AN_EPOCH = _killed(("batch", _STEPS + 5))
_RARELY: dict[str, Any] = {"every": 7}

SITUATIONS: dict[str, Situation] = {
    "killed within an epoch": Situation(_IN_AN_EPOCH),
    "killed where epochs end, twice": Situation(_killed(("epoch end", 0), ("epoch end", 1))),
    "killed before the next epoch's first batch": Situation(_killed(("batch", _STEPS))),
    "killed in the validation behind an epoch": Situation(_killed(("validation", _STEPS))),
    "killed in a validation within an epoch": Situation(_killed(("validation", 20)), {"validates_every": 5}),
    "random numbers of the model": Situation(_IN_AN_EPOCH, {"dropout": True}),
    "random numbers of the dataset": Situation(_IN_AN_EPOCH, {"noise": True}),
    "the same in the loader's worker": Situation(_IN_AN_EPOCH, {"noise": True, "workers": 1}),
    "averages over an epoch that `log` keeps": Situation(_IN_AN_EPOCH, {"averages": True}, doors=TRAINERS),
    "buffers that change behind a batch": Situation(_IN_AN_EPOCH, {"counts": True}),
    "on twice as many ranks": Situation(
        _IN_AN_EPOCH, {"shuffles": True}, {"ranks": 2}, {}, ("Trainer", *LOOPS), served_once=True
    ),
    "on half as many ranks": Situation(
        _IN_AN_EPOCH, {"shuffles": True, "ranks": 2}, {"ranks": 1}, {}, ("ddp", *LOOPS), served_once=True
    ),
    "a model that adapts what it loads": Situation(
        _IN_AN_EPOCH, {}, {"renames": True}, doors=("Trainer", "ddp", *LOOPS)
    ),
    "another model": Situation(_IN_AN_EPOCH, {}, {"width": 8}, doors=("Trainer", "ddp", *LOOPS)),
    "finished, and started again": Situation(tells=("again",)),
    "finished, with more epochs": Situation((), {}, {"epochs": 4}, tells=("again",)),
    **{
        f"{name}, with rare saves": Situation((("batch", _STEPS + 3, name),), _RARELY, tells=("code", "again"))
        for name in ("SIGTERM", "SIGINT")
    },
    "SIGTERM in a validation": Situation(
        (("validation", _STEPS, "SIGTERM"),), _RARELY | {"dropout": True}, tells=("code", "again")
    ),
}


#: In double precision, which `scar_ddp` trains in here, the order of a sum makes less of a difference.
_ROUNDING = 1e-9

#: Where a traceback names it.
_ERROR = r"^(?:\w+\.)*(\w+(?:Error|Exception))\b"


class Outcome(NamedTuple):
    """What a run did.

    Attributes:
        codes: How each of its starts ended.
        said: The kind of error.
        again: The number of steps that were made twice.
        record: What is compared, by name, what others depend on first.

    """

    codes: list[int | None]
    said: str
    again: int
    record: dict[str, Any]


def live(asked: Asked, then: Mapping[str, Any], starts: int) -> Outcome:
    """Start a training so many times, and read what it left behind.

    Args:
        asked: What each of its processes is to do.
        then: What is different for those that are started last.
        starts: How often it is started. Under ``scar_ddp`` a death is no reason to start anew.

    """
    folder, codes = Path(asked.folder), []
    for number in range(starts):
        if number == starts - 1 > 0:
            asked = replace(asked, dies=(), **then)
        for error in folder.glob("error-*.txt"):
            error.unlink()
        codes.append(_start(asked, folder))
    errors = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime)
    said = next((kind for path in errors for kind in re.findall(_ERROR, path.read_text(), re.MULTILINE)[-1:]), "")
    return Outcome(codes, said, *_read(folder, asked.door == "scar_ddp"))


def _start(asked: Asked, folder: Path) -> int | None:
    if asked.door != "scar_ddp":
        codes = processes.run(train, asked.ranks, folder, asked, limit=_LIMIT)
        return next((code for code in codes if code), codes[0])
    command = [sys.executable, "-m", "benchmarks.resume_training", asked.json()]
    with (folder / "output.txt").open("wb") as output, kills.start_child(command, kills.environment(), output) as child:
        try:
            code = child.wait(_LIMIT)
        except TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None
    if code:
        (folder / "error-0.txt").write_text((folder / "output.txt").read_text())
    return code


def _read(folder: Path, by_step: bool) -> tuple[int, dict[str, Any]]:
    noted: dict[str, dict[str, list[Any]]] = {"batches": {}, "validations": {}, "averages": {}}
    for name, of_rank in noted.items():
        for path in sorted(folder.glob(f"{name}-*.jsonl")):
            of_rank[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    batches = noted["batches"]
    again = max((len(lines) - len({at for at, *_ in lines}) for lines in batches.values()), default=0)
    # What was made again counts as it was made last.
    last = {rank: {at: rest for at, *rest in lines} for rank, lines in batches.items()}
    ends = {path.stem: torch.load(path, weights_only=False) for path in sorted(folder.glob("end-*.pt"))}
    return again, {
        # Another number of ranks counts batches in another way.
        "all samples": Counter(i for lines in batches.values() for _, ids, _ in lines for i in ids),
        "samples": {rank: {at: ids for at, (ids, _) in lines.items()} for rank, lines in last.items()},
        "random numbers": {rank: {at: drawn for at, (_, drawn) in lines.items()} for rank, lines in last.items()},
        **(_by_step(batches) if by_step else {}),
        **{name: {rank: dict(lines) for rank, lines in noted[name].items()} for name in ("validations", "averages")},
        **{
            name: {rank: end.get(name) for rank, end in ends.items()}
            for name in ("steps", "epochs", "schedules", "callbacks", "weights", "optimizer")
        },
    }


def _by_step(batches: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Return samples and random numbers of each step, whichever rank computed them.

    Survivors compute a dead one's batch besides theirs, whole or in parts, and before that they try whether parts do.
    """
    served: dict[int, set[int]] = {}
    drawn: dict[int, dict[tuple[int, ...], float]] = {}
    for lines in batches.values():
        for at, ids, number in lines:
            served.setdefault(at, set()).update(ids)
            if len(ids) == BATCH:
                drawn.setdefault(at, {})[tuple(ids)] = number
    return {"samples": {"all": {at: sorted(ids) for at, ids in served.items()}}, "random numbers": {"all": drawn}}


# -- a cell ----------------------------------------------------------------------------------------------------------

#: What differs anyway where other samples or random numbers were used.
_FOLLOWS = {
    "random numbers": ("samples",),
    "averages": ("samples", "random numbers"),
    "validations": ("samples", "random numbers"),
    "weights": ("samples", "random numbers", "schedules"),
    "optimizer": ("samples", "random numbers", "schedules", "weights"),
    "callbacks": ("samples", "random numbers", "validations", "weights"),
}


def cell(situation: Situation, door: str, side: str, folder: Path) -> str:
    """Return what of a run is exact, in words.

    Args:
        situation: How the run is disturbed.
        door: Its front door.
        side: ``"scar"`` or ``"peer"``.
        folder: An empty folder.

    """
    options = {"ranks": DOORS[door], **situation.options}
    asked = Asked(str(folder / "cut"), door, side, **options)
    starts = 1 if door == "scar_ddp" and _is_killed(situation) else max(len(situation.dies), 1) + 1
    whole = replace(asked, folder=str(folder / "whole"), **(situation.then if situation.whole is None else {}))
    for each in (asked, whole):
        Path(each.folder).mkdir(parents=True)
    cut = live(replace(asked, dies=situation.dies), situation.then, starts)
    if cut.codes[-1] != 0:
        return _ended(cut)
    words = [differences(cut.record, live(whole, {}, 1).record, situation.served_once)]
    if "again" in situation.tells:
        words.insert(0, f"{cut.again} steps again")
    if "code" in situation.tells:
        words.insert(0, "exit " + ", ".join(str(_exit_code(code)) for code in cut.codes[:-1]))
    return "; ".join(words)


def _is_killed(situation: Situation) -> bool:
    return bool(situation.dies) and all(how == "SIGKILL" for *_, how in situation.dies)


def _exit_code(code: int | None) -> int | None:
    """Return what a shell sees."""
    return code if code is None or code >= 0 else 128 - code


def _ended(outcome: Outcome) -> str:
    if outcome.codes[-1] is None:
        return "hangs"
    return f"ends with {outcome.said or _exit_code(outcome.codes[-1])}"


def differences(cut: Mapping[str, Any], whole: Mapping[str, Any], served_once: bool = False) -> str:
    """Return ``"exact"``, or what differs, but for what follows from that.

    Args:
        cut: The record of the run that was disturbed.
        whole: That of the other.
        served_once: Whether only the samples count, whichever rank was served them.

    """
    if served_once:
        served, wanted = cut["all samples"], whole["all samples"]
        return "exact" if served == wanted else f"other {_samples(served, wanted)}"
    off = [name for name in whole if name != "all samples" and not _same(cut[name], whole[name])]
    named = [_named(name, cut, whole) for name in off if not set(_FOLLOWS.get(name, ())) & set(off)]
    return "other " + ", ".join(named) if named else "exact"


def _named(name: str, cut: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if name == "samples":
        return _samples(*(_counted(record["samples"]) for record in (cut, whole)))
    if name not in ("validations", "steps", "epochs"):
        return name
    one, other = (next(iter(record[name].values()), None) for record in (cut, whole))
    one, other = (len(value) if isinstance(value, dict) else value for value in (one, other))
    return name if one == other else f"{name} ({one}, not {other})"


def _samples(served: Counter[int], wanted: Counter[int]) -> str:
    return f"samples ({(served - wanted).total()} again, {(wanted - served).total()} never)"


def _counted(by_rank: Mapping[str, Mapping[int, list[int]]]) -> Counter[int]:
    return Counter(i for lines in by_rank.values() for ids in lines.values() for i in ids)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING) if a.dtype == torch.float64 else torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def main() -> None:
    """Measure, print and write JSON."""
    parser = report.arguments((__doc__ or "").split("\n")[0], rounds=1)
    parser.add_argument("--only", action="append", help="a situation, as it is called in the table", metavar="WHICH")
    parser.add_argument("--door", action="append", choices=DOORS, help="a front door")
    parser.add_argument("--side", choices=("scar", "peer"), help="whose checkpoints; both by default")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(SITUATIONS):
        parser.error(f"there is no situation {sorted(unknown)[0]!r}: choose from {', '.join(SITUATIONS)}")
    names = options.only or list(SITUATIONS)[: 2 if options.quick else None]
    doors = options.door or (["Trainer", "Fabric"] if options.quick else list(DOORS))
    sides = [options.side] if options.side else ["scar", "peer"]
    figures: dict[str, Any] = {"settings": {"batches": 2 * BATCHES, "batch": BATCH}}
    rows = []
    for name in names:
        row = [name]
        for door in doors:
            row.append("")
            for side in sides:
                if door not in SITUATIONS[name].doors or (door == "scar_ddp" and side == "peer"):
                    continue
                report.progress(f"{name}; {door}; {side}")
                with report.scratch(options.dir) as folder:
                    words = figures[f"{side}, {door}, {name}"] = cell(SITUATIONS[name], door, side, folder)
                row[-1] += f"**{words}**" if side == "scar" else f"; {words}"
        rows.append(row)
    found = {key: words for key, words in figures.items() if key != "settings"}
    exact = {key for key, words in found.items() if words.endswith("exact")}
    peers = [key for key in exact if key.startswith("peer")]
    behind = [key for key in peers if f"scar{key[4:]}" in found.keys() - exact]
    figures |= {"cells": len(found), "cells_behind": len(behind)}
    targets = [Target("cells in which the framework's own is exact and ours is not", len(behind), 0)]
    # Whole lines, which a page can take.
    for row in [["", *doors], ["---"] * (len(doors) + 1), *rows]:
        print(f"| {' | '.join(row)} |")
    report.show_targets(targets)
    report.write(options.json, figures, targets)


if __name__ == "__main__":
    main()
