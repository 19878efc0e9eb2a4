"""Both papers reproduced with the library's own code: ``python -m benchmarks.paper [EXPERIMENT ...] --json OUT``."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.paper import bounds, comparison, equal_overhead, outages
from benchmarks.paper.strategies import FEW, FULL, STRATEGIES, Strategy
from benchmarks.paper.tasks import tasks
from benchmarks.paper.trials import Task
from benchmarks.report import Target

#: Failures of a task whose trials are cheap, and of one of the others; and of both with ``--quick``.
_TRIALS, _TRIALS_OF_SLOW = (100, 4), (30, 2)
_SLOW = ("cnn_layers", "cnn_shards", "gpt")
#: What ``--quick`` leaves out: much like another.
_NOT_QUICK = ("mf_plain", "cnn_layers")

Figures = dict[str, Any]


class Experiment(NamedTuple):
    """What can be asked for by name.

    Attributes:
        measure: Runs it.
        show: Prints its tables.
        conclusions: Says what they mean.
        draw: Draws a picture of its own; tasks share one.

    """

    measure: Callable[[], Figures]
    show: Callable[[Figures], None]
    conclusions: Callable[[Figures], list[str]]
    draw: Callable[[Figures, Path], None] | None = None


def experiments(options: argparse.Namespace) -> dict[str, Experiment]:
    """All experiments by name, in the order in which they run."""

    def overhead() -> Figures:
        with report.scratch(options.dir) as folder:
            return equal_overhead.measure(options.quick, folder, options.rounds)

    def trials(usual: int, quick: int) -> int:
        return int(options.trials or (quick if options.quick else usual))

    chosen = options.strategies or (FEW if options.quick else STRATEGIES)

    def comparison_of(task: Task) -> Experiment:
        count = trials(*(_TRIALS_OF_SLOW if task.name in _SLOW else _TRIALS))
        return Experiment(
            lambda: comparison.measure(task, count, options.seed, chosen),
            lambda found: comparison.show(task.name, found),
            lambda found: comparison.conclusions(task.name, found),
        )

    return {
        "bounds": Experiment(
            lambda: bounds.measure(trials(200, 20), options.seed), bounds.show, bounds.conclusions, bounds.draw
        ),
        **{name: comparison_of(task) for name, task in tasks(options.movielens).items()},
        "overhead": Experiment(overhead, equal_overhead.show, equal_overhead.conclusions),
        "outages": Experiment(
            lambda: outages.measure(trials(20, 2), options.seed, options.quick),
            outages.show,
            outages.conclusions,
            outages.draw,
        ),
    }


def run(chosen: Mapping[str, Experiment], plots: Path | None) -> Iterator[tuple[str, Figures]]:
    """Runs experiments one after the other, prints what each found, and draws it.

    Args:
        chosen: Which.
        plots: The folder for the pictures; ``None`` for none.

    """
    for name, experiment in chosen.items():
        report.progress(f"{name} ...")
        found = experiment.measure()
        experiment.show(found)
        found["conclusions"] = experiment.conclusions(found)
        print("\n".join(found["conclusions"]))
        if plots and experiment.draw:
            experiment.draw(found, plots / f"{name}.png")
        yield name, found


def targets(found: Mapping[str, Figures], quick: bool = False) -> list[Target]:
    """What was to be reached; quick figures of what a save costs count for nothing."""
    aims = [aim for name in tasks() if name in found for aim in comparison.targets(name, found[name])]
    if "bounds" in found:
        over = sum(found["bounds"][f"{kind}_over_bound"] for kind in bounds.KINDS)
        aims.append(Target("runs over the bound", over, 0))
    if "overhead" in found and not quick:
        aims += equal_overhead.targets(found["overhead"])
    return aims


def _strategies(names: str) -> list[Strategy]:
    """Those of a comma-separated list; full checkpoints are always among them, since all is compared with them."""
    known = {strategy.name: strategy for strategy in STRATEGIES}
    asked = [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in known]:
        raise argparse.ArgumentTypeError(f"there is no strategy {', '.join(unknown)}; choose from {', '.join(known)}")
    return [strategy for name, strategy in known.items() if name in (FULL.name, *asked)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="by default all of them, one by one")
    parser.add_argument(
        "--trials", type=int, help=f"failures of each task (default {_TRIALS[0]}, slow ones {_TRIALS_OF_SLOW[0]})"
    )
    parser.add_argument(
        "--strategies", type=_strategies, metavar="NAMES", help='only some, e.g. "distance 1/8,refresh 1/8"'
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (default 0)")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="draw PNGs into this folder")
    parser.add_argument("--quick", action="store_true", help="few trials and strategies: does it all work?")
    parser.add_argument("--movielens", metavar="PATH", type=Path, help="u.data of MovieLens 100K (default: download)")
    parser.add_argument("--rounds", type=int, help="of the overhead: how often each save is measured")
    report.add_places(parser)
    options = parser.parse_args()
    known = experiments(options)
    if unknown := [name for name in options.experiments if name not in known]:
        parser.error(f"there is no experiment {', '.join(unknown)}; choose from {', '.join(known)}")
    for name, least in (("trials", 1), ("seed", 0), ("rounds", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value} must be at least {least}")
    if options.movielens and not options.movielens.is_file():
        parser.error(f"--movielens {options.movielens} is not a file; leave it out to download the ratings")
    return options


def main() -> None:
    """Measures, prints, draws and writes JSON."""
    options = _options()
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
    known = experiments(options)
    names = options.experiments or [name for name in known if not (options.quick and name in _NOT_QUICK)]
    settings = {name: getattr(options, name) for name in ("trials", "seed", "quick", "rounds")}
    settings["strategies"] = [strategy.name for strategy in options.strategies or ()] or None
    found: Figures = {}
    for name, figures in run({name: known[name] for name in names}, options.plots):
        found[name] = figures
        # After each of them, since all together they take hours.
        report.write(options.json, {**found, "settings": settings}, targets(found, options.quick))
    compared = {name: figures for name, figures in found.items() if name in tasks()}
    if options.plots and compared:
        comparison.draw(compared, options.plots / "tasks.png")
    if aims := targets(found, options.quick):
        report.show_targets(aims)


if __name__ == "__main__":
    main()
