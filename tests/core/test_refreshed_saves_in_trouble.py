"""Refreshes, damage, kills, interruptions and full disks: nothing is restored that nobody had."""

import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from belief import Belief, Believed, assert_restored
from core_helpers import Training, assert_same, bits, drain, rows_of, saved_steps, writes_failing, writes_held
from ranks import run_ranks
from shared_helpers import make_training
from test_refreshed_saves import ADAM, One, Regression, distance_of, opened, refresh_of
from test_stager import staging_held

from lightning_scar.core import stager
from lightning_scar.core.restoration import load
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates, distance
from lightning_scar.storage.store import DeltaStore


def flip(file: str | Path, offset: int) -> None:
    content = bytearray(Path(file).read_bytes())
    content[offset] ^= 1
    Path(file).write_bytes(content)


def block_of(believed: list[Believed], key: str) -> list[torch.Tensor]:
    """All slots of a block as they are believed."""
    name = key.rpartition("[")[0]
    found = []
    for group, _, values, _ in believed:
        if group.name == name:
            rows = rows_of(key)
            found.append(values[rows.start - group.first_row : rows.stop - group.first_row])
    return found


def loaded_block(checkpoint: dict[str, Any], believed: list[Believed], key: str) -> list[torch.Tensor]:
    name, found = key.rpartition("[")[0], []
    for group, slot, _, _ in believed:
        if group.name == name:
            value: Any = checkpoint
            for place in group.slots[slot].paths[0]:
                value = value[place]
            found.append(value[rows_of(key)])
    return found


def is_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


# -- damage ------------------------------------------------------------------------------------------------------------


def trained(folder: Path, steps: int = 6) -> tuple[Training, dict[int, list[Believed]], dict[int, dict[str, Any]]]:
    """A run, what was believed at each of its steps, and what it was then."""
    training, beliefs, history = make_training(40), {}, {}
    with opened(folder, fraction=0.3) as running:
        belief = Belief(running)
        for _ in range(steps):
            training.step()
            training.save(running)
            believed, live = belief.rows(), training.checkpoint()
            beliefs[training.steps] = believed
            history[training.steps] = {
                key: [tensor.detach().clone() for tensor in loaded_block(live, believed, key)]
                for key in running._stager.bases.map.numbers
            }
    return training, beliefs, history


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_damaged_refresh_falls_back_to_the_bases_and_costs_precision_only(part: str, tmp_path: Path) -> None:
    _, beliefs, history = trained(tmp_path)
    store = DeltaStore(tmp_path)
    store.refresh()
    newest = max(store.deltas, key=lambda delta: delta.head.sequence)
    refresh = next(refresh for refresh in newest.refreshes if refresh.group == "state_dict/0.weight")
    flip(newest.file, getattr(refresh.slots["exp_avg"], part).start)
    with pytest.warns(UserWarning, match=r"refresh of state_dict/0\.weight in .*costs precision only") as caught:
        found = load(tmp_path)
    assert len(caught) == 1
    steps = saved_steps(tmp_path)
    for key, step in steps.items():
        mine = loaded_block(found, beliefs[6], key)
        if key.startswith("state_dict/0.weight["):
            assert is_same(mine, history[step][key]), "the base, all of one step"
        elif not key.startswith("skeleton"):
            assert is_same(mine, block_of(beliefs[6], key))


def test_a_damaged_base_falls_back_to_the_older_one_without_the_refresh_of_the_newer(tmp_path: Path) -> None:
    _, beliefs, history = trained(tmp_path)
    store = DeltaStore(tmp_path)
    store.refresh()
    key = next(
        key
        for key, step in sorted(saved_steps(tmp_path).items())
        if 1 < step < 6 and key.startswith("state_dict/0.weight[") and len(store.index.versions(key)) > 1
    )
    (delta, block), (_, older) = store.index.versions(key)
    assert store.index.refreshes(block)
    flip(delta.file, block.slots["param"].start)
    with pytest.warns(UserWarning, match="older versions are used"):
        found = load(tmp_path)
    mine = loaded_block(found, beliefs[6], key)
    step, until = older.version.step, block.version.step
    candidates = [history[step][key], *(block_of(beliefs[at], key) for at in range(step, until))]
    assert any(is_same(mine, candidate) for candidate in candidates)
    assert not is_same(mine, block_of(beliefs[6], key))
    for other in history[6]:
        if other != key:
            assert is_same(loaded_block(found, beliefs[6], other), block_of(beliefs[6], other)), other


def test_optimizer_state_of_a_base_is_not_read_where_a_refresh_replaces_it(tmp_path: Path) -> None:
    _, beliefs, _ = trained(tmp_path)
    store = DeltaStore(tmp_path)
    store.refresh()
    damaged = set()
    for delta in store.deltas:
        for block in store.index.live(delta):
            if store.index.refreshes(block) and "exp_avg" in block.slots:
                flip(delta.file, block.slots["exp_avg"].start)
                damaged.add(block.key)
    assert len(damaged) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_restored(load(tmp_path), beliefs[6])
    assert {damage.block for damage in store.verify()} == damaged


def test_a_run_resumed_from_a_damaged_refresh_goes_on_from_its_bases(tmp_path: Path) -> None:
    trained(tmp_path)
    store = DeltaStore(tmp_path)
    store.refresh()
    newest = max(store.deltas, key=lambda delta: delta.head.sequence)
    for refresh in newest.refreshes:
        flip(newest.file, refresh.slots["param"].codes.start)
    training = make_training(40)
    with opened(tmp_path, fraction=0.3) as running:
        with pytest.warns(UserWarning, match="costs precision only"):
            training.load(running.restore().checkpoint)
        belief = Belief(running)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                training.step()
                training.save(running)
                assert_restored(load(tmp_path), belief.rows())


# -- kills -------------------------------------------------------------------------------------------------------------


def killed(rank: int, url: str, steps: int) -> None:
    training = Regression(ADAM)
    running = opened(url, fraction=0.2)
    for _ in range(steps):
        training.step()
        training.save(running)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_whose_last_save_was_refreshed_goes_on_within_the_error_that_it_told(tmp_path: Path) -> None:
    url, steps = str(tmp_path / "scar"), 9
    [failure] = run_ranks(killed, 1, url, steps, failing=True)
    assert failure.type == "Ended", failure
    lost, resumed = Regression(ADAM), Regression(ADAM)
    for _ in range(steps):
        lost.step()
    with opened(url, fraction=0.2) as running:
        restored = running.restore()
        resumed.load(restored.checkpoint)
        told = restored.plan.distance
        assert told is not None
        assert restored.plan.refreshed > 0
        assert 0 < distance_of(restored.checkpoint, lost.checkpoint()) == pytest.approx(told, rel=1e-3)
    # By so much at most a linear model of this distance can differ.
    inputs = torch.cat([lost.x, torch.ones(len(lost.x), 1)], 1)
    most = float(torch.linalg.matrix_norm(inputs, 2)) * told / math.sqrt(lost.y.numel())
    assert abs(math.sqrt(resumed.loss().item()) - math.sqrt(lost.loss().item())) <= most * 1.001
    for _ in range(5):
        lost.step()
        resumed.step()
    assert resumed.loss().item() == pytest.approx(lost.loss().item(), rel=0.1)


def killed_with_memory(rank: int, url: str, **settings: Any) -> None:
    training = make_training(40)
    running = opened(url, fraction=0.3, **settings)
    for _ in range(6):
        training.step()
        training.save(running)
        running.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_memory_holds_is_refreshed_as_what_storage_holds(host: Path, tmp_path: Path) -> None:
    in_memory, in_storage = str(tmp_path / "in-memory"), str(tmp_path / "in-storage")
    options = {"memory": True, "durable_every_n_saves": 100}
    for url, own in ((in_memory, options), (in_storage, {})):
        [failure] = run_ranks(killed_with_memory, 1, url, failing=True, **own)
        assert failure.type == "Ended", failure
    expected = load(in_storage)
    assert_same(load(in_memory), expected)
    with opened(in_memory, fraction=0.3, **options) as running:
        restored = running.restore()
        assert_same(restored.checkpoint, expected)
        assert "this host's memory" in running.recovery
        assert restored.plan.refreshed > 0
    assert_same(load(in_memory), expected)


def test_blocks_that_turn_nan_are_healed_with_their_refresh(memory_url: str) -> None:
    training = make_training(40)
    with opened(memory_url, fraction=0.3) as running:
        for _ in range(5):
            training.step()
            training.save(running)
        expected = load(memory_url)
        with torch.no_grad():
            training.model[0].weight[::2] = torch.nan
        kept = training.model[0].weight[1::2].detach().clone()
        parts = {"optimizers": {("optimizer_states", 0): training.optimizers[0]}}
        plan = running.heal(training.checkpoint(), parameters=training.model.parameters(), **parts)
        assert plan is not None
        assert plan.refreshed > 0
    healed = {key: step for key, step in saved_steps(memory_url).items() if key.startswith("state_dict/0.weight[")}
    assert len(healed) > 1
    weight, found = training.model[0].weight, expected["state_dict"]["0.weight"]
    for rows in map(rows_of, healed):
        was_hurt = bool((torch.arange(40)[rows] % 2 == 0).any())
        assert torch.equal(weight[rows], found[rows] if was_hurt else kept[rows.start // 2 : rows.stop // 2])


# -- interruptions -----------------------------------------------------------------------------------------------------


def assert_goes_on(training: Training, running: RunningCheckpoint, belief: Belief, url: str) -> None:
    """The next saves, and what a crash behind them leaves."""
    for _ in range(2):
        training.step()
        training.save(running)
        found = load(url)
        assert_restored(found, belief.rows())
        if not running._stager.bases.due.any():
            expected = pytest.approx(running.stats.distance, rel=1e-3, abs=1e-6)
            assert distance_of(found, training.checkpoint()) == expected
        assert found["global_step"] == training.steps
    training.save(running, full=True)
    assert_same(load(url), training.checkpoint())


@contextmanager
def beginning(url: str, **settings: Any) -> Iterator[tuple[Training, RunningCheckpoint, Belief]]:
    training = make_training(40)
    with opened(url, fraction=0.3, **settings) as running:
        belief = Belief(running)
        for _ in range(3):
            training.step()
            training.save(running)
        training.step()
        yield training, running, belief


def test_an_interruption_between_stage_and_fence_loses_nothing(memory_url: str) -> None:
    with beginning(memory_url) as (training, running, belief):
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            training.begin(running)
            running.stage()
            raise KeyboardInterrupt
        running.fence()
        drain(running)
        assert_restored(load(memory_url), belief.rows())
        assert load(memory_url)["global_step"] == training.steps
        assert_goes_on(training, running, belief, memory_url)


def ends(*args: Any) -> None:
    raise SystemExit


@pytest.mark.parametrize("handler", [signal.default_int_handler, ends], ids=["KeyboardInterrupt", "SystemExit"])
def test_a_signal_while_the_fence_waits_leaves_the_save_to_the_next_call(handler: Any, memory_url: str) -> None:
    main, before = threading.main_thread().ident, signal.signal(signal.SIGINT, handler)
    assert main is not None
    try:
        with beginning(memory_url) as (training, running, belief):
            with staging_held() as go:
                training.begin(running)
                running.stage()
                timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
                timer.start()
                with pytest.raises((KeyboardInterrupt, SystemExit)):
                    running.fence()
                timer.join()
                go.set()
                running.fence()
            drain(running)
            assert load(memory_url)["global_step"] == training.steps
            assert_restored(load(memory_url), belief.rows())
            assert_goes_on(training, running, belief, memory_url)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def failing_at(number: int, error: type[BaseException]) -> Iterator[None]:
    """The copy of the group with this number ends in an error."""
    gather, calls = stager.gather, iter(range(1000))

    def faulty(*args: Any) -> None:
        if next(calls) == number:
            raise error
        gather(*args)

    stager.gather = faulty
    try:
        yield
    finally:
        stager.gather = gather


@pytest.mark.sampled(3)
@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("staging", "error"), [("eager", KeyboardInterrupt), ("eager", MemoryError), ("lazy", MemoryError)]
)
def test_an_error_in_the_midst_of_the_copies_loses_nothing(
    number: int, full: bool, staging: str, error: type[BaseException], memory_url: str
) -> None:
    with beginning(memory_url, staging=staging) as (training, running, belief):
        before = load(memory_url)
        with failing_at(number, error), pytest.raises(error):  # noqa: PT012
            training.begin(running, full=full)
            running.stage()
            running.fence()
        drain(running)
        assert_same(load(memory_url), before)
        assert_goes_on(training, running, belief, memory_url)


def test_an_error_before_anything_is_copied_loses_nothing(memory_url: str) -> None:
    mistakes: list[bool] = []

    def mistaken(candidates: Candidates) -> torch.Tensor:
        if mistakes:
            raise KeyboardInterrupt
        return distance(candidates)

    with beginning(memory_url, staging="eager", policy=mistaken) as (training, running, belief):
        mistakes.append(True)
        with pytest.raises(KeyboardInterrupt):
            training.save(running)
        mistakes.clear()
        assert_goes_on(training, running, belief, memory_url)


@contextmanager
def interrupted_at(line: int) -> Iterator[list[bool]]:
    """Ctrl-C at one of the lines of a save that this thread runs, by their order; tells whether it came to that."""
    files = {f"{name}.py" for name in ("running_checkpoint", "stager", "bases")}
    lines, struck = iter(range(1_000_000)), [False]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if os.path.basename(frame.f_code.co_filename) not in files or "core" not in frame.f_code.co_filename:
            return None
        if event == "line" and not struck[0] and next(lines) == line:
            struck[0] = True
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield struck
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("staging", ["lazy", "eager"])
def test_ctrl_c_at_any_line_of_a_save_loses_nothing(staging: str, memory_url: str) -> None:
    line, stride, is_struck = 0, 9, True
    while is_struck:
        training, url = One(16), f"{memory_url}/{line}"
        with opened(url, fraction=0.3, staging=staging) as running:
            belief = Belief(running)
            for _ in range(2):
                training.step()
                training.save(running)
            training.step()
            with interrupted_at(line) as struck, suppress(KeyboardInterrupt):
                training.begin(running, wait=True)
                running.stage()
                running.fence()
            # Whoever catches it may train on.
            for _ in range(2):
                training.step()
                training.save(running)
                assert_restored(load(url), belief.rows())
            # Of two places in the queue none is lost.
            with writes_held(running):
                for _ in range(2):
                    training.step()
                    assert training.begin(running), line
                    running.fence()
            training.save(running, full=True)
        assert_same(load(url), training.checkpoint())
        is_struck, line = struck[0], line + stride
    assert line > 10 * stride


# -- full disks --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:lightning-scar")
@pytest.mark.parametrize("failing", [1, 2])
def test_writes_that_fail_with_the_next_save_staged_leave_no_hole_and_no_refresh_of_a_base_that_is_not_there(
    failing: int, tmp_path: Path
) -> None:
    training, url = make_training(40), str(tmp_path / "scar")
    with opened(url, fraction=0.3) as running:
        belief = Belief(running)
        for _ in range(3):
            training.step()
            training.save(running)
        commit, released, calls = running.store.commit, threading.Event(), iter(range(100))

        def faulty(*args: Any) -> Any:
            released.wait()
            if next(calls) < failing:
                raise OSError("No space left on device")
            return commit(*args)

        running.store.commit = faulty  # type: ignore[method-assign]
        for _ in range(2):
            training.step()
            training.begin(running, wait=True)
            running.fence()
        released.set()
        drain(running)
        steps = saved_steps(url)
        assert 4 not in steps.values()
        assert load(url)["global_step"] == (5 if failing == 1 else 3)
        for key, block in blocks_on_disk(url).items():
            for found in block:
                assert (found.refresh.bases[found.position][1]) == sequence_of(url, key), key
        running.store.commit = commit  # type: ignore[method-assign]
        for _ in range(2):
            training.step()
            training.save(running)
            assert_restored(load(url), belief.rows())
        assert refresh_of(running, "state_dict/0.weight") is not None
        training.save(running, full=True)
    assert_same(load(url), training.checkpoint())


def blocks_on_disk(url: str) -> dict[str, Any]:
    """The refreshes that a reader would take, by block."""
    store = DeltaStore(url)
    store.refresh()
    return {key: store.index.refreshes(store.index.versions(key)[0].block) for key in list(store.index.keys())}


def sequence_of(url: str, key: str) -> int:
    store = DeltaStore(url)
    store.refresh()
    return store.index.versions(key)[0].block.version.sequence


@pytest.mark.filterwarnings("ignore:lightning-scar")
def test_while_writes_fail_what_is_on_disk_stays_and_then_all_is_right_again(tmp_path: Path) -> None:
    training, folder = make_training(40), tmp_path / "scar"
    with opened(folder, fraction=0.3) as running:
        belief = Belief(running)
        for _ in range(3):
            training.step()
            training.save(running)
        believed = belief.rows()
        with writes_failing(folder):
            for _ in range(3):
                training.step()
                training.save(running)
        assert_restored(load(folder), believed)
        for _ in range(4):
            training.step()
            training.save(running)
            assert_restored(load(folder), belief.rows())
