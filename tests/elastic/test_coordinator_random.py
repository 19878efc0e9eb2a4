"""The coordinator under any sequence of events: what must always hold."""

import signal

from hypothesis import given
from hypothesis import strategies as st

from lightning_scar.elastic.protocol.messages import (
    RESTART_EXIT_CODE,
    Back,
    Began,
    Ended,
    Event,
    Exited,
    Finish,
    Formed,
    Kill,
    Lost,
    Notice,
    Ready,
    Registered,
    Restart,
    Spawn,
    Stepped,
    Stop,
    StopAsked,
    Stranded,
    Waiting,
)
from lightning_scar.elastic.supervisor.coordinator import Coordinator
from lightning_scar.elastic.supervisor.policy import Policy

SLOTS = 3
#: What node 1 runs.
NODE_1 = (1, 2)

happenings = st.tuples(
    st.sampled_from(
        [
            "register",
            "begin",
            "step",
            "wait",
            "wait",
            "switch",
            "strand",
            "ready",
            "end",
            "exit",
            "exit",
            "late",
            "node",
            "node",
        ]
    ),
    st.integers(0, SLOTS - 1),
    st.sampled_from([0, 1, -9, RESTART_EXIT_CODE]),
    st.integers(-1, 3),
    st.sampled_from([0.0, 0.0, 0.5, 3.0, 40.0]),
)


class World:
    """Workers that do anything, and what must hold of the notices that they get."""

    def __init__(self) -> None:
        self.now = 0.0
        self.living: dict[int, int] = {}
        self.left: dict[int, str] = {}
        self.members: dict[int, int] = {}
        self.generation = -1
        self.last_spawn = -1
        self.is_over = False
        self.is_restarting = False
        self.is_disbanded = False
        self.node_1_is_there = True
        self.doomed: list[tuple[int, int]] = []
        policy = Policy(max_restarts=20, restart_window=3600, hang_timeout=30, stop_timeout=10, kill_grace=1)
        self.coordinator = Coordinator(SLOTS, policy, lambda _: None)
        self.check(self.coordinator.start(0.0))

    def take(self, event: Event) -> None:
        self.check(self.coordinator.handle(event, self.now))

    def check(self, notices: list[Notice]) -> None:
        for notice in notices:
            assert not self.is_over
            if isinstance(notice, Formed):
                self.check_formed(notice)
            elif isinstance(notice, Spawn):
                assert notice.slot not in self.living
                assert self.node_1_is_there or notice.slot not in NODE_1
                assert notice.spawn > self.last_spawn
                self.last_spawn = self.living[notice.slot] = notice.spawn
            elif isinstance(notice, Kill):
                assert self.living[notice.slot] == notice.spawn
                self.doomed.append((notice.slot, notice.spawn))
            elif isinstance(notice, Restart):
                assert all(slot in self.left for slot in self.living_members())
                self.is_restarting = True
            elif isinstance(notice, Stop):
                self.is_disbanded |= notice.disbands
            elif isinstance(notice, Finish):
                assert not self.living
                self.is_over = True

    def check_formed(self, notice: Formed) -> None:
        generation = notice.generation
        assert generation.number > self.generation
        assert not self.is_disbanded
        assert generation.source in generation.spawns
        if not self.living:
            self.is_restarting = False
        else:
            assert not self.is_restarting
            survivors = self.living_members()
            assert survivors
            assert all(self.left.get(slot) in ("wait", "switch") for slot in survivors)
            assert set(generation.spawns) == {*survivors, *generation.joiners}
            assert all(self.living[slot] == spawn for slot, spawn in generation.spawns.items())
            assert all(self.left.get(slot) == "ready" for slot in generation.joiners)
        self.generation, self.members = generation.number, dict(generation.spawns)
        self.left = {slot: how for slot, how in self.left.items() if slot not in generation.spawns}

    def living_members(self) -> list[int]:
        return [slot for slot, spawn in self.members.items() if self.living.get(slot) == spawn]

    def happen(self, what: str, slot: int, code: int, step: int, later: float) -> None:
        self.now += later
        self.check(self.coordinator.tick(self.now))
        if what == "late":
            self.take(Exited(slot, -7, code))
        if what == "node":
            self.lose_or_return()
        if slot not in self.living:
            return
        spawn, is_member = self.living[slot], slot in self.living_members()
        if what == "register":
            self.take(Registered(slot, spawn))
        elif what == "begin":
            self.take(Began(slot, spawn))
        elif what == "step":
            self.take(Stepped(slot, spawn))
        elif what == "end":
            self.take(Ended(slot, spawn))
        elif what in ("wait", "switch", "strand") and is_member:
            if self.left.get(slot) != "strand":
                self.left[slot] = what
            stranded = Stranded(slot, spawn, self.generation, step)
            waiting = Waiting(
                slot, spawn, self.generation, step, what == "switch", 0.0, "" if what == "switch" else "reset"
            )
            self.take(stranded if what == "strand" else waiting)
        elif what == "ready":
            self.left[slot] = "ready"
            self.members.pop(slot, None)
            self.take(Ready(slot, spawn))
        elif what == "exit":
            self.exit(slot, code)

    def lose_or_return(self) -> None:
        if not self.node_1_is_there:
            self.node_1_is_there = True
            self.take(Back(1, NODE_1))
            return
        self.node_1_is_there = False
        for slot in NODE_1:
            self.living.pop(slot, None)
            self.left.pop(slot, None)
        self.take(Lost(1, NODE_1))

    def exit(self, slot: int, code: int) -> None:
        spawn = self.living.pop(slot)
        self.left.pop(slot, None)
        self.take(Exited(slot, spawn, code))


@given(st.lists(happenings, max_size=60))
def test_whatever_happens(sequence: list[tuple[str, int, int, int, float]]) -> None:
    world = World()
    for happening in sequence:
        world.happen(*happening)


@given(st.lists(happenings, max_size=40), st.booleans())
def test_every_job_can_be_ended(sequence: list[tuple[str, int, int, int, float]], by_signal: bool) -> None:
    world = World()
    for happening in sequence:
        world.happen(*happening)
    if world.is_over:
        return
    if not by_signal:
        world.living.clear()
    world.take(StopAsked(signal.SIGTERM, 0) if by_signal else Lost(1, tuple(range(SLOTS)), for_good=True))
    for _ in range(3):
        world.now += 20
        world.check(world.coordinator.tick(world.now))
        for slot, spawn in world.doomed:
            if world.living.get(slot) == spawn:
                world.exit(slot, -signal.SIGKILL)
    assert world.is_over


@given(st.lists(happenings, max_size=40))
def test_every_job_comes_to_a_good_end_when_failures_cease(sequence: list[tuple[str, int, int, int, float]]) -> None:
    world = World()
    for happening in sequence:
        world.happen(*happening)
    if not (world.node_1_is_there or world.is_over):
        world.lose_or_return()
    for _ in range(12):
        world.now += 40
        world.check(world.coordinator.tick(world.now))
        for slot in sorted(world.living):
            if slot not in world.living:
                continue
            if world.is_restarting:
                world.exit(slot, RESTART_EXIT_CODE)
                continue
            world.happen("register", slot, 0, 0, 0.0)
            world.happen("begin", slot, 0, 0, 0.0)
            world.happen("end", slot, 0, 0, 0.0)
            if slot in world.living:
                world.exit(slot, 0)
    assert world.is_over
