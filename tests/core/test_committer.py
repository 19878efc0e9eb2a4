"""What a save leaves on disk, and which full saves ranks may count on, whatever order they commit in."""

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from core_helpers import codes_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_scar.core.blocks import Group, Slot
from lightning_scar.core.codec import Codec
from lightning_scar.core.committer import Committer
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.rework import Motion
from lightning_scar.core.save import Part, Save
from lightning_scar.core.stats import Stats
from lightning_scar.storage.delta import StorageError
from lightning_scar.storage.head import Mark, Version
from lightning_scar.storage.rank_store import RankStore
from lightning_scar.storage.reading import Reading, fill
from lightning_scar.storage.store import DeltaStore

COUNTER = itertools.count()
BLOCKS = 4


def group(rank: int) -> Group:
    return Group(f"w{rank}", (BLOCKS, 8), (Slot("param", torch.uint8, None, ((f"w{rank}",),)),), 1)


def values(step: int, number: int) -> torch.Tensor:
    return torch.full((8,), step * BLOCKS + number, dtype=torch.uint8)


class Rank:
    """One rank without its training: every save is of these blocks, at this step."""

    def __init__(self, url: str, rank: int, n: int, incarnation: int = 1) -> None:
        self.rank = rank
        self.store = RankStore(url, rank=rank, world_size=n)
        self.store.refresh()
        self.incarnation = incarnation
        self.committer = Committer(self.store, Stats(), Ranks(rank, n), incarnation)
        self.done: dict[int, set[int]] = {}

    def commit(self, step: int, blocks: set[int], full: bool) -> None:
        blocks = set(range(BLOCKS)) if full else blocks
        numbers = sorted(blocks)
        copies = torch.cat([values(step, number) for number in numbers]) if numbers else torch.empty(0).byte()
        part = Part(group(self.rank), [], exact=numbers, rows=[copies])
        version = Version(self.incarnation, step, step)
        self.committer.commit(Save(version, full, memoryview(bytearray(b"rest")), [part]), BLOCKS * 8)
        self.done[step] = blocks


def served(url: str, ranks: list[Rank]) -> Mark | None:
    """The newest full save that can be read; checks that every block of it is there as it was then."""
    store = DeltaStore(url)
    store.refresh()
    mark = store.index.consistent
    if mark is None:
        return None
    for rank in ranks:
        for number in range(BLOCKS):
            key = group(rank.rank).key(number)
            at = next((at for at in store.index.versions(key) if at.block.version.mark <= mark), None)
            assert at is not None, f"{key} of {mark} is not kept"
            memory = at.block.new_memory()
            assert not fill([Reading(at, memory.copy)])
            written = max(step for step, blocks in rank.done.items() if step <= mark.step and number in blocks)
            assert bytes(memory["param"]) == bytes(values(written, number).tolist()), (key, mark)
    return mark


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[int, list[tuple[int, bool, bool]], list[int]]:
    """Saves that are the same on all ranks, some of which a rank skips or fails, and whose commit comes when."""
    n = draw(st.integers(2, 3))
    saves = draw(st.lists(st.sampled_from("FFPS"), min_size=1, max_size=9))
    orders = draw(st.lists(st.integers(0, n - 1), max_size=n * (len(saves) + 1)))
    bad = draw(st.sets(st.tuples(st.integers(0, n - 1), st.integers(1, len(saves))), max_size=4))
    return n, [("F", bad)] + [(kind, bad) for kind in saves], orders  # type: ignore[list-item]


@given(run=interleavings(), blind=st.sets(st.integers(0, 30)))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_some_full_save_can_always_be_read(memory_url: str, run: Any, blind: set[int]) -> None:
    n, saves, orders = run
    url = f"{memory_url}/{next(COUNTER)}"
    ranks, at = [Rank(url, rank, n) for rank in range(n)], [0] * n
    newest: Mark | None = None
    # Whoever is not drawn any more commits what is left in turn.
    for turn, rank in enumerate([*orders, *(rank for _ in saves for rank in range(n))]):
        if at[rank] == len(saves):
            continue
        step, (kind, bad) = at[rank], saves[at[rank]]
        at[rank] += 1
        if (rank, step) in bad:
            continue
        storage = ranks[rank].store
        look = storage.look_around
        if turn in blind:
            # The listing fails, or a slow write began before the others' writes.
            storage.look_around = lambda others=False: None  # type: ignore[method-assign]
        ranks[rank].commit(step, {step % BLOCKS, 0}, kind == "F")
        storage.look_around = look  # type: ignore[method-assign]
        found = served(url, ranks)
        assert newest is None or (found is not None and found >= newest), "what could be read cannot be any more"
        newest = found


def test_a_full_save_counts_when_all_have_finished_it(memory_url: str) -> None:
    ranks = [Rank(memory_url, rank, 3) for rank in range(3)]
    for step in (0, 5):
        for rank in ranks:
            before = None if step == 0 else Mark(1, 0)
            assert served(memory_url, ranks) == before
            rank.commit(step, set(), full=True)
        assert served(memory_url, ranks) == Mark(1, step)


def test_a_rank_that_is_two_full_saves_behind_does_not_cost_the_one_that_all_have(memory_url: str) -> None:
    fast, slow = (Rank(memory_url, rank, 2) for rank in range(2))
    fast.commit(0, set(), full=True)
    slow.commit(0, set(), full=True)
    for step in (1, 2, 3):
        fast.commit(step, set(), full=True)
        assert served(memory_url, [fast, slow]) == Mark(1, 0)
    slow.commit(1, set(), full=True)
    assert served(memory_url, [fast, slow]) == Mark(1, 1)


@pytest.mark.parametrize("failing", [0, 1])
def test_after_a_failed_full_save_a_later_one_counts(failing: int, memory_url: str) -> None:
    ranks = [Rank(memory_url, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.commit(0, set(), full=True)
    ranks[1 - failing].commit(1, set(), full=True)
    counted = []
    for step in range(2, 8):
        for rank in ranks:
            rank.commit(step, {step % BLOCKS}, full=step % 2 == 0)
        counted.append(served(memory_url, ranks))
    assert counted[0] in (Mark(1, 0), Mark(1, 2))
    assert counted[2:] == [Mark(1, 4), Mark(1, 4), Mark(1, 6), Mark(1, 6)]


def test_a_rank_that_never_saves_again_costs_no_memory(memory_url: str) -> None:
    """The others keep three versions of a block, however many full saves they finish."""
    ranks = [Rank(memory_url, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.commit(0, set(), full=True)
    for step in range(1, 40):
        ranks[0].commit(step, {step % BLOCKS}, full=step % 3 == 0)
        kept = [len(ranks[0].store.index.versions(group(0).key(i))) for i in range(BLOCKS)]
        assert max(kept) <= 3
    assert served(memory_url, ranks) == Mark(1, 0)


def test_a_run_that_goes_on_serves_the_full_save_before_until_all_have_another(memory_url: str) -> None:
    ranks = [Rank(memory_url, rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.commit(3, set(), full=True)
    later = [Rank(memory_url, rank, 2, incarnation=2) for rank in range(2)]
    for rank, before in zip(later, ranks, strict=True):
        rank.done = dict(before.done)
        rank.committer.go_on_from((1,))
    for step in (4, 5):
        later[0].commit(step, {1}, full=step == 5)
        assert served(memory_url, ranks) == Mark(1, 3)
    later[1].commit(5, set(), full=True)
    assert served(memory_url, later) == Mark(2, 5)


def test_a_distance_beyond_any_float_is_written_and_read_all_the_same(memory_url: str) -> None:
    rank = Rank(memory_url, 0, 1)
    save = with_state(0, [0, 1], torch.ones(2, 2))
    save.squared_rest, save.motion = math.inf, Motion(math.inf, math.nan)
    rank.committer.commit(save, 32)
    store = DeltaStore(memory_url)
    store.refresh()
    [delta] = store.deltas
    assert delta.head.info["distance"] == sys.float_info.max
    assert delta.head.info["motion"] == [sys.float_info.max] * 2


# -- what is left out --------------------------------------------------------------------------------------------------


def with_state(number: int, exact: list[int], moment: torch.Tensor, refreshed: tuple[int, ...] = ()) -> Save:
    """A save of two blocks of two values, and of a moment of each."""
    slots = tuple(Slot(name, torch.float32, None, ((name,),)) for name in ("param", "exp_avg"))
    own = Group("w", (2, 2), slots, 1)
    param = torch.full((2, 2), float(number))
    rows = [tensor[exact].contiguous().flatten().view(torch.uint8) for tensor in (param, moment)]
    part = Part(own, [], exact=exact, rows=rows if exact else [], refreshed=list(refreshed))
    if refreshed:
        part.codes = {"param": codes_of(Codec("linear", 4), own)}
        part.table = torch.tensor([(number, number + 1, 1, 0) for number in refreshed])
    return Save(Version(1, number, number), number == 0, memoryview(bytearray(b"rest")), [part])


@pytest.fixture
def rank(memory_url: str) -> Rank:
    found = Rank(memory_url, 0, 1)
    found.committer.commit(with_state(0, [0, 1], torch.ones(2, 2)), 32)
    return found


def steps_on_disk(url: str) -> list[int]:
    store = DeltaStore(url)
    store.refresh()
    newest = [store.index.newest(f"w[{i}:{i + 1}]") for i in range(2)]
    return [block.version.step if block is not None else -1 for block in newest]


def test_a_block_whose_state_is_not_finite_is_not_written_over_a_good_version(rank: Rank, memory_url: str) -> None:
    rank.committer.commit(with_state(1, [0, 1], torch.tensor([[1.0, torch.nan], [1.0, 1.0]])), 32)
    assert steps_on_disk(memory_url) == [0, 1]
    assert rank.committer.unwritten.get_nowait() == (Version(1, 1, 1), {"w[0:1]"})


def test_a_block_whose_state_was_never_finite_is_written_as_it_is(memory_url: str) -> None:
    rank = Rank(memory_url, 0, 1)
    rank.committer.commit(with_state(0, [0, 1], torch.full((2, 2), torch.inf)), 32)
    assert steps_on_disk(memory_url) == [0, 0]
    assert rank.committer.unwritten.empty()


@pytest.mark.parametrize(("value", "expected"), [(0.0, False), (1.0, False), (-1e-30, True)])
def test_the_signs_of_a_slot_are_those_of_its_first_copy(value: float, expected: bool, memory_url: str) -> None:
    rank = Rank(memory_url, 0, 1)
    rank.committer.commit(with_state(0, [0, 1], torch.full((2, 2), value)), 32)
    rank.committer.commit(with_state(1, [0, 1], torch.full((2, 2), -1.0)), 32)
    assert rank.committer.negative == {("w", "exp_avg"): expected}


def test_the_refresh_lies_beside_the_exact_blocks_with_the_version_of_its_bases(rank: Rank, memory_url: str) -> None:
    rank.committer.commit(with_state(1, [0], torch.ones(2, 2), refreshed=(1,)), 32)
    assert steps_on_disk(memory_url) == [1, 0]
    store = DeltaStore(memory_url)
    store.refresh()
    first, second = (store.index.newest(f"w[{i}:{i + 1}]") for i in range(2))
    assert first is not None
    assert second is not None
    assert store.index.refreshes(first) == []
    [found] = store.index.refreshes(second)
    assert (found.delta.head.step, found.refresh.spans[found.position]) == (1, (1, 2))


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_save_that_would_leave_a_hole_is_not_written(memory_url: str) -> None:
    rank = Rank(memory_url, 0, 1)
    commit = rank.store.commit

    def failing(*args: Any) -> int:
        raise OSError("the disk is full")

    rank.store.commit = failing  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the disk is full"):
        rank.committer.commit(with_state(0, [0, 1], torch.ones(2, 2)), 32)
    rank.store.commit = commit  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="would be incomplete"):
        rank.committer.commit(with_state(1, [1], torch.ones(2, 2)), 32)
    assert steps_on_disk(memory_url) == [-1, -1]
    rank.committer.commit(with_state(2, [0, 1], torch.ones(2, 2)), 32)
    rank.committer.commit(with_state(3, [1], torch.ones(2, 2)), 32)
    assert steps_on_disk(memory_url) == [2, 3]
    unwritten = [rank.committer.unwritten.get_nowait() for _ in range(2)]
    assert unwritten == [(Version(1, 0, 0), {"w[0:1]", "w[1:2]"}), (Version(1, 1, 1), {"w[1:2]"})]
