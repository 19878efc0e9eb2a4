"""For every block the freshest source there is, and what the whole plan says."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from lightning_scar.core.blocks import BlockMap, Group, Slot
from lightning_scar.core.recovery import IncompleteError, RecoveryPlan, Source, known_distance, known_rework
from lightning_scar.storage.delta import Column, Delta, Section, checksum
from lightning_scar.storage.delta_file import encode
from lightning_scar.storage.directory import Directory
from lightning_scar.storage.head import Head, Mark, Version
from lightning_scar.storage.index import Index
from lightning_scar.storage.reading import Damage

FOLDER = Directory("memory://recovery")
COUNTER = itertools.count()
STATE = BlockMap(
    tuple(Group(name, (4,), (Slot("param", torch.float32, None, ((name,),)),), 2) for name in ("v", "w")), 8
)
KEYS = ["v[0:2]", "v[2:4]", "w[0:2]", "w[2:4]"]
DAMAGE = Damage("a file", "a reason")


def delta(step: int, keys: Sequence[str], rank: int = 0, n: int = 1, full: bool = False, **info: object) -> Delta:
    said = Head(
        incarnation=1,
        lineage=(1,),
        sequence=step,
        step=step,
        rank=rank,
        world_size=n,
        kind="full" if full else "partial",
        whole=True,
        consistent=(Mark(1, step),) if full else (),
        state_bytes=32,
        info=info,
    )
    data = bytes([step] * 8)
    version = Version(1, step, step)
    sections = []
    for key in keys:
        group, rows = key.removesuffix("]").split("[")
        start, stop = map(int, rows.split(":"))
        column = Column("F32", (1,), 8, [checksum(data)], lambda: [memoryview(data)])
        sections.append(Section(group, [(start, stop)], [version], {"param": column}))
    return encode(said, sections).write(FOLDER, f"{next(COUNTER)}.safetensors")


def index(*deltas: Delta) -> Index:
    return Index((1,), deltas)


def steps(plan: RecoveryPlan) -> dict[str, int]:
    return {key: version.step for key, version in plan.versions.items()}


def sources(plan: RecoveryPlan) -> list[Source]:
    assert list(plan) == KEYS
    return [plan[key].source for key in plan]


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_fresh_process_reads_the_newest_version_of_every_block() -> None:
    plan = RecoveryPlan(STATE, index(delta(0, KEYS), delta(3, KEYS[1:3])))
    assert sources(plan) == [Source.NEWEST] * 4
    assert steps(plan) == dict(zip(KEYS, [0, 3, 3, 0], strict=True))
    assert plan.is_whole
    assert [plan[key].nbytes for key in KEYS] == [8] * 4


def test_what_a_rank_still_holds_comes_from_there_and_not_from_disk() -> None:
    plan = RecoveryPlan(STATE, index(delta(0, KEYS)), alive={KEYS[0]: 2, KEYS[3]: 0}, initial={"v", "w"})
    assert sources(plan) == [Source.SURVIVOR, Source.NEWEST, Source.NEWEST, Source.SURVIVOR]
    assert [plan[key].rank for key in KEYS] == [2, None, None, 0]
    assert set(steps(plan)) == set(KEYS[1:3])
    assert plan.is_whole


def test_the_first_rank_is_a_survivor_too() -> None:
    plan = RecoveryPlan(STATE, index(), alive=dict.fromkeys(KEYS, 0))
    assert sources(plan) == [Source.SURVIVOR] * 4
    assert str(plan) == "4 blocks (32 B) from survivors."


def test_initial_values_are_the_last_resort() -> None:
    plan = RecoveryPlan(STATE, index(delta(0, KEYS[:3])), initial={"v", "w"})
    assert sources(plan) == [Source.NEWEST] * 3 + [Source.INITIAL]
    assert not plan.is_whole
    assert KEYS[3] not in steps(plan)


@pytest.mark.parametrize("initial", [set(), {"v"}])
def test_a_block_without_any_source_is_named(initial: set[str]) -> None:
    with pytest.raises(IncompleteError, match=r"block w\[2:4\] left; it is not filled with initial values"):
        RecoveryPlan(STATE, index(delta(0, KEYS[:3])), initial=initial)


def test_versions_after_a_full_save_are_left_aside() -> None:
    found = index(delta(0, KEYS, full=True), delta(3, KEYS[:2]))
    assert steps(RecoveryPlan(STATE, found))[KEYS[0]] == 3
    plan = RecoveryPlan(STATE, found, limit=Mark(1, 0))
    assert set(steps(plan).values()) == {0}
    assert sources(plan) == [Source.NEWEST] * 4
    with pytest.raises(IncompleteError):
        RecoveryPlan(STATE, index(delta(3, KEYS)), limit=Mark(1, 2))


# -- falling back ------------------------------------------------------------------------------------------------------


def test_damage_leads_to_the_older_version_then_to_initial_values_then_to_an_error() -> None:
    plan = RecoveryPlan(STATE, index(delta(0, KEYS), delta(3, KEYS)), initial={"v"})
    key = KEYS[0]
    newest, older = plan[key].versions
    plan.fall_back(key, DAMAGE)
    assert plan[key].source is Source.OLDER
    assert steps(plan)[key] == 0
    assert steps(plan)[KEYS[1]] == 3
    plan.fall_back(key, DAMAGE)
    assert plan[key].source is Source.INITIAL
    assert [(at.block.version, found) for at, found in plan.damages] == [
        (newest.block.version, DAMAGE),
        (older.block.version, DAMAGE),
    ]
    plan.fall_back(KEYS[2], DAMAGE)
    with pytest.raises(IncompleteError, match=r"block w\[0:2\]"):
        plan.fall_back(KEYS[2], DAMAGE)


def test_a_plan_that_falls_back_leaves_the_index_as_it_was() -> None:
    found = index(delta(0, KEYS), delta(3, KEYS))
    plan = RecoveryPlan(STATE, found)
    plan.fall_back(KEYS[0], DAMAGE)
    assert [at.block.version.step for at in found.versions(KEYS[0])] == [3, 0]


# -- what it says ------------------------------------------------------------------------------------------------------


def both(**info: object) -> Index:
    return index(delta(4, KEYS[:2], 0, 2, **info), delta(5, KEYS[2:], 1, 2, **info))


def test_the_distance_is_that_of_all_ranks_together() -> None:
    plan = RecoveryPlan(STATE, both(distance=3.0, motion=[1.0, 2.0]))
    assert plan.distance == pytest.approx(18**0.5)
    assert plan.rework == pytest.approx(2.0)
    assert "the lost state was 4.24 away from this one, about 2 steps of training." in str(plan)
    assert "Rank 0 last saved at step 4." in str(plan), "not at step 5, as the other"


def test_the_distance_is_unknown_where_a_rank_says_nothing() -> None:
    for found in (both(), index(delta(4, KEYS, 0, 2, distance=3.0, motion=[1.0, 2.0]))):
        plan = RecoveryPlan(STATE, found)
        assert plan.distance is None
        assert plan.rework is None
        assert str(plan).endswith("The distance to the lost state is not known.")
    assert known_distance({}) is None
    assert known_rework({}) is None


def test_a_distance_of_0_is_known() -> None:
    plan = RecoveryPlan(STATE, both(distance=0.0, motion=[0.0, 0.0]))
    assert plan.distance == 0
    assert plan.rework == 0


@pytest.mark.parametrize("times", [1, 2])
def test_the_distance_is_unknown_when_something_older_is_used(times: int) -> None:
    old, new = delta(1, KEYS), delta(4, KEYS, distance=3.0, motion=[1.0, 2.0])
    plan = RecoveryPlan(STATE, index(old, new), initial={"v", "w"})
    assert plan.distance == 3
    for _ in range(times):
        plan.fall_back(KEYS[0], DAMAGE)
    assert plan.distance is None
    assert plan.rework is None
    assert not plan.is_whole


def test_a_state_of_which_blocks_survive_is_moved_by_no_more() -> None:
    plan = RecoveryPlan(STATE, both(distance=3.0, motion=[1.0, 2.0]), alive={KEYS[0]: 1})
    assert plan.distance == pytest.approx(18**0.5)
    assert str(plan).startswith("1 block (8 B) from survivors, 3 blocks (24 B) from newest versions in storage. ")


def test_every_kind_of_source_is_counted() -> None:
    plan = RecoveryPlan(STATE, index(delta(0, KEYS[:3]), delta(3, KEYS[1:3])), alive={KEYS[0]: 1}, initial={"w"})
    plan.fall_back(KEYS[1], DAMAGE)
    assert str(plan) == (
        "1 block (8 B) from survivors, 1 block (8 B) from newest versions in storage, "
        "1 block (8 B) from older versions, 1 block (8 B) from initial values. "
        "The distance to the lost state is not known."
    )
