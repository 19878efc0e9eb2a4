"""Jobs in double precision, which end where they end without failures."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scar_ddp_runs import Fault, Training, assert_done, train

#: In double precision the order of a sum makes less of a difference than this; the second undisturbed run has another.
TOLERANCE = 1e-10


def train_double(
    folder: Path,
    *faults: Fault,
    optimizer: str = "SGD",
    model: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **more: Any,
) -> Training:
    """A job in double precision, which ended well."""
    options = {"max_epochs": 2, "gradient_clip_val": 0.5, "limit_val_batches": 0, **(trainer or {})}
    more = {"ranks": 3, "run": ("--max-restarts", "99"), **more}
    job = train(
        folder, *faults, model={"double": True, "optimizer": optimizer, **(model or {})}, trainer=options, **more
    )
    assert_done(job, steps_of(more["ranks"], options.get("accumulate_grad_batches", 1)), more["ranks"])
    return job


def steps_of(ranks: int, micro_batches: int = 1) -> int:
    return 2 * (96 // 4 // ranks // micro_batches)


@cache
def undisturbed(door: str, ranks: int, optimizer: str) -> Training:
    with TemporaryDirectory(prefix="undisturbed-") as folder:
        return train_double(Path(folder), ranks=ranks, door=door, optimizer=optimizer)


def samples(training: Training) -> dict[int, list[int]]:
    """Of each step, over all workers, in the generation that completed it for those who live on."""
    generations = training.generations
    last = {
        (attempt["step"], attempt["pid"]): attempt["used"]
        for attempt in training.attempts
        if attempt["generation"] == generations.get(attempt["step"])
    }
    used: dict[int, list[int]] = {}
    for (step, _), batches in last.items():
        used.setdefault(step, []).extend(i for batch in batches for i in batch)
    return {step: sorted(ids) for step, ids in used.items()}


def difference(a: Training, b: Training, but: tuple[str, ...] = ()) -> float:
    """The largest one of a parameter, relative to the largest value of its tensor; but for names with such words."""
    names = [name for name in a.state["state_dict"] if not any(word in name for word in but)]
    pairs = [(a.state["state_dict"][name], b.state["state_dict"][name]) for name in names]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)
