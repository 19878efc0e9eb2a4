"""A worker's part in the generations: processes and gloo groups, told what to do by the notices of the test."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import psutil
import pytest
import torch
import torch.distributed as dist
from prepared import multiprocessing_context
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from lightning_scar.elastic.protocol.log import Events, Notices
from lightning_scar.elastic.protocol.messages import (
    Broken,
    Event,
    Exited,
    Formed,
    Generation,
    Joining,
    Notice,
    Ready,
    Restart,
    Stop,
    Stranded,
    Waiting,
)
from lightning_scar.elastic.supervisor.coordinator import Coordinator
from lightning_scar.elastic.supervisor.policy import Policy
from lightning_scar.elastic.supervisor.wakeups import Wakeups
from lightning_scar.elastic.worker.errors import CutOffError, RestartError
from lightning_scar.elastic.worker.member import Member

Work: TypeAlias = Callable[[Member, Callable[[Any], None]], None]

#: Not forked from here: a lock that a thread of this test's store holds at that moment would never be released there.
_CONTEXT = multiprocessing_context()
#: Nobody may have to wait for it.
TIMEOUT = timedelta(seconds=60)
#: How soon whoever is blocked is to be woken; less than the timeout by far, and enough for a loaded machine.
SOON = 40.0


class Crew:
    """The supervisor's store, and workers that each do some work in a process of their own."""

    def __init__(self) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.events = Events.create(self.store)
        self.wakeups = Wakeups()
        self.notices = Notices(self.store, self.wakeups.ring)
        self.heard: list[Event] = []
        self.processes: dict[int, Any] = {}
        self.ears: dict[int, Connection] = {}

    def post(self, *notices: Notice) -> None:
        self.notices.append(*notices)

    def form(self, number: int, *slots: int, spawns: dict[int, int] | None = None, **fields: Any) -> Formed:
        formed = Formed(Generation(number, spawns or {slot: slot for slot in slots}, source=slots[0], **fields))
        self.post(formed)
        return formed

    def start(self, slot: int, work: Work, spawn: int | None = None, generation: int = 0, world_size: int = 4) -> None:
        ear, mouth = _CONTEXT.Pipe(duplex=False)
        fields = (slot, slot if spawn is None else spawn, generation, world_size, self.wakeups.port)
        self.processes[slot] = _CONTEXT.Process(target=_work, args=(self.store.port, fields, work, mouth), daemon=True)
        self.processes[slot].start()
        mouth.close()
        self.ears[slot] = ear

    def says(self, slot: int, within: float = SOON) -> Any:
        """What a worker reports next."""
        assert self.ears[slot].poll(within), f"rank {slot} says nothing for {within} s"
        return self.ears[slot].recv()

    def is_silent(self, slot: int, during: float = 0.5) -> bool:
        return not self.ears[slot].poll(during)

    def wait_for(self, *kinds: type) -> None:
        """Waits for events of these kinds, in any order."""
        missing, deadline = list(kinds), time.monotonic() + SOON
        while missing:
            assert time.monotonic() < deadline, f"no {missing} in {self.heard}"
            for event in self.events.news():
                self.heard.append(event)
                if type(event) in missing:
                    missing.remove(type(event))
            self.wakeups.wait(0.1)

    def kill(self, slot: int) -> None:
        self.processes[slot].kill()
        self.processes[slot].join()

    def close(self) -> None:
        for slot in self.processes:
            self.kill(slot)
        self.wakeups.close()


def _work(port: int, fields: tuple[int, ...], work: Work, mouth: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        work(Member("127.0.0.1", port, *fields), mouth.send)
    except BaseException as error:
        mouth.send(f"{type(error).__name__}: {error}")
    # The group and the store are there still: what runs at the end of an interpreter would wait for them.
    os._exit(0)


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.close()


def total(number: float = 1.0) -> float:
    tensor = torch.full((1000,), number)
    dist.all_reduce(tensor)
    return float(tensor[0])


def enter_first(member: Member) -> None:
    member.enter_first(backend="gloo", timeout=TIMEOUT)


def enter_next(member: Member, step: int = 0, boundary: bool = True) -> Generation:
    return member.enter_next(step, boundary, backend="gloo", timeout=TIMEOUT)


# -- blocked, and woken -----------------------------------------------------------------------------------------------


def hold(member: Member, say: Callable[[Any], None]) -> None:
    """Keeps its group when a collective failed, so that nobody is woken by its leaving."""
    enter_first(member)
    say(total())
    try:
        if member.slot != 0:
            total()
    except RuntimeError:
        say("failed")
    time.sleep(100)


def test_a_member_whose_neighbours_are_alive_is_woken_by_the_notice(crew: Crew) -> None:
    crew.form(0, 0, 1, 2, 3)
    for slot in range(4):
        crew.start(slot, hold)
    assert [crew.says(slot) for slot in range(4)] == [4] * 4
    assert all(crew.is_silent(slot, 0.1) for slot in range(1, 4))
    crew.kill(0)
    assert [crew.says(slot) for slot in (1, 3)] == ["failed"] * 2
    assert crew.is_silent(2)
    crew.post(Broken(0, "rank 0 was killed"))
    assert crew.says(2) == "failed"


def go_on(member: Member, say: Callable[[Any], None]) -> None:
    """Goes on in ever new groups, whatever fails."""
    enter_first(member)
    while True:
        with noted(say):
            say(total())
            enter_next(member)


@contextmanager
def noted(say: Callable[[Any], None]) -> Iterator[None]:
    """Reports that the group failed, instead of raising that."""
    try:
        yield
    except (RestartError, CutOffError):
        raise
    except RuntimeError:
        say("failed")


def test_groups_form_anew_in_the_same_processes(crew: Crew) -> None:
    formed, size = 15, 3
    coordinator = Coordinator(size, Policy(), lambda _: None)
    crew.post(*coordinator.start(time.monotonic()))
    for slot in range(size):
        crew.start(slot, go_on, world_size=size)
    heard = dict.fromkeys(range(size), 0)
    deadline = time.monotonic() + 2 * SOON
    while min(heard.values()) < formed:
        assert time.monotonic() < deadline
        for event in crew.events.news():
            crew.post(*coordinator.handle(event, time.monotonic()))
        for slot in range(size):
            if not crew.is_silent(slot, 0.005):
                assert crew.says(slot) == size
                heard[slot] += 1


def test_survivors_go_on_without_the_dead(crew: Crew) -> None:
    coordinator = Coordinator(3, Policy(), lambda _: None)
    crew.post(*coordinator.start(time.monotonic()))
    for slot in range(3):
        crew.start(slot, train, world_size=3)
    assert [crew.says(slot) for slot in range(3)] == [3] * 3
    crew.kill(1)
    crew.events.append(Exited(1, 1, -signal.SIGKILL))
    deadline = time.monotonic() + SOON
    while coordinator._group.present.generation.number == 0:
        assert time.monotonic() < deadline
        for event in crew.events.news():
            crew.post(*coordinator.handle(event, time.monotonic()))
        time.sleep(0.01)
    assert [crew.says(slot) for slot in (0, 2)] == [(2, "rank 1 was killed by SIGKILL")] * 2


def step_on() -> None:
    while True:
        total()


def train(member: Member, say: Callable[[Any], None]) -> None:
    """Until its group fails; then with the survivors."""
    enter_first(member)
    member.begin()
    say(total())
    with pytest.raises(RuntimeError) as caught:
        step_on()
    assert member.caused_by_peer_loss(caught.value)
    generation = enter_next(member, step=1, boundary=False)
    say((total(), generation.deaths))
    time.sleep(100)


def form_with_a_dead_one(crew: Crew) -> None:
    """Of three that wait for their next group one dies, before it is formed with all of them."""
    crew.form(0, 0, 1, 2)
    for slot in range(3):
        crew.start(slot, go_on)
    assert [crew.says(slot) for slot in range(3)] == [3] * 3
    crew.wait_for(Waiting, Waiting, Waiting)
    crew.kill(2)
    crew.form(1, 0, 1, 2)


def test_who_forms_a_group_with_one_that_died_is_woken(crew: Crew) -> None:
    form_with_a_dead_one(crew)
    assert crew.is_silent(0)
    crew.post(Broken(1, "rank 2 was killed"))
    assert [crew.says(slot) for slot in (0, 1)] == ["failed"] * 2


def test_a_group_that_is_broken_before_it_is_formed_keeps_nobody(crew: Crew) -> None:
    form_with_a_dead_one(crew)
    crew.post(Broken(1, "rank 2 was killed"))
    assert [crew.says(slot) for slot in (0, 1)] == ["failed"] * 2


def fail(member: Member, say: Callable[[Any], None]) -> None:
    """Has no way through an outage, as in a start-up."""
    enter_first(member)
    say(total())
    try:
        step_on()
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)


def test_who_fails_with_a_lost_peer_says_so(crew: Crew) -> None:
    crew.form(0, 0, 1)
    for slot in range(2):
        crew.start(slot, fail)
    assert [crew.says(slot) for slot in range(2)] == [2] * 2
    crew.kill(1)
    crew.wait_for(Stranded)


def go_on_among_strangers(member: Member, say: Callable[[Any], None]) -> None:
    """As on several nodes."""
    os.environ["LIGHTNING_SCAR_NODE_0"] = "127.0.0.1"
    try:
        enter_first(member)
        total()
    except RuntimeError as error:
        say(str(error))
    enter_next(member)
    say(total())
    time.sleep(100)


def test_a_stranger_in_a_group_is_noticed_before_anything_is_sent_to_it(crew: Crew) -> None:
    crew.form(0, 0, 1)
    crew.start(1, go_on_among_strangers)
    listening: list[Any] = []
    soon(lambda: bool(listening.extend(listeners(crew.processes[1].pid)) or listening))
    with ExitStack() as stack:
        strangers = []
        # gloo takes who says the number of the missing connection. They begin with 0.
        for number in range(3):
            stranger = stack.enter_context(socket.create_connection(listening[0], timeout=10))
            stranger.sendall(number.to_bytes(8, "little"))
            strangers.append(stranger)
        crew.start(0, go_on_among_strangers)
        told = crew.says(1)
        for stranger in strangers:
            host, port = stranger.getsockname()
            assert f"{host}:{port}" in told
            assert stranger.recv(1) == b""
    assert told.endswith("got into the process group and is no member")
    assert crew.says(0) == told
    crew.post(Broken(0, told))
    crew.form(1, 0, 1)
    assert [crew.says(slot) for slot in (0, 1)] == [2, 2]


def listeners(pid: int) -> list[tuple[str, int]]:
    sockets = psutil.Process(pid).net_connections("tcp4")
    return [(one.laddr.ip, one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN]


# -- what is told -----------------------------------------------------------------------------------------------------


def member_of(crew: Crew, slot: int = 0, spawn: int | None = None, generation: int = 0) -> Member:
    return Member(
        "127.0.0.1", crew.store.port, slot, slot if spawn is None else spawn, generation, 4, crew.wakeups.port
    )


def blocked(function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    future = ThreadPoolExecutor(1).submit(function, *arguments)
    time.sleep(0.2)
    assert not future.done()
    return future


def heard(member: Member, step: int) -> str:
    """What was announced. The store does not confirm a set: another worker may look before it is there."""
    soon(lambda: bool(member.announced(step)))
    return member.announced(step)


def leader_and_other(crew: Crew) -> tuple[Member, Member]:
    """Both have heard that a replacement waits, which is a reason to announce something."""
    crew.form(0, 0, 1)
    members = member_of(crew, 0), member_of(crew, 1)
    crew.post(Joining(0, (2,)))
    for member in members:
        member.generation = Generation(0, {0: 0, 1: 1}, source=0)
        soon(member.joiners_are_ready)
    return members


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def announce(member: Member, word: str, step: int) -> None:
    """As a leader does it before every step, until all have acknowledged the reason."""
    soon(lambda: member.announce(word, step) or member._has_announced)


def test_an_announcement_is_heard_from_its_step_on(crew: Crew) -> None:
    leader, other = leader_and_other(crew)
    assert other.announced(4) == ""
    announce(leader, "switch", 5)
    assert heard(other, 6) == "switch"
    assert [other.announced(step) for step in (4, 5)] == ["", "switch"]


def test_the_first_announcement_counts(crew: Crew) -> None:
    leader, other = leader_and_other(crew)
    announce(leader, "switch", 5)
    announce(leader, "stop", 3)
    assert heard(other, 9) == "switch"
    time.sleep(0.2)
    assert other.announced(9) == "switch"


def test_nothing_is_announced_before_all_have_acknowledged_the_reason(crew: Crew) -> None:
    """Who has not heard of it does not look: to ask the store behind each step would cost more than all the rest."""
    leader = member_of(crew, 0)
    leader.generation = crew.form(0, 0, spawns={0: 0, 1: 7}).generation
    crew.post(Broken(9, ""), Joining(0, (2,)))
    soon(leader.joiners_are_ready)
    leader.announce("switch", 4)
    assert not crew.store.check(["announcement/0"])
    # The other one hears of it, and of one more.
    member_of(crew, 1, spawn=7)
    crew.post(Joining(0, (2, 3)))
    announce(leader, "switch", 5)
    assert crew.store.get("announcement/0") == b"5 switch"
    assert crew.store.add("acknowledgements/0", 0) == 2


@pytest.mark.parametrize("is_first", [True, False])
def test_a_stop_is_acknowledged_in_the_generation_that_hears_of_it_and_in_the_next(crew: Crew, is_first: bool) -> None:
    if is_first:
        crew.form(0, 0, 1)
    crew.post(Stop("SIGTERM"))
    number = 1
    members = [member_of(crew, 0), member_of(crew, 1)]
    generation = crew.form(number, 0, 1).generation
    members[0].generation = generation
    announce(members[0], "stop", 5)
    members[1].generation = generation
    assert heard(members[1], 5) == "stop"
    assert crew.store.add("acknowledgements/0", 0) == 2 * is_first


def test_all_start_again_and_one_keeps_the_state(crew: Crew) -> None:
    crew.form(0, 0, 1)
    future = blocked(member_of(crew).strand, 7)
    crew.post(Restart(0, keeper=1))
    with pytest.raises(RestartError) as caught:
        future.result(SOON)
    assert caught.value.keeper == 1


def test_a_late_replacement_is_not_misled_by_what_was(crew: Crew) -> None:
    crew.form(0, 0, 1)
    crew.post(Joining(0, (1,)), Broken(0, "rank 1 died"), Restart(0, keeper=0))
    crew.form(1, 0, 1)
    crew.post(Broken(1, "rank 1 died"))
    crew.form(2, 0)
    late = member_of(crew, slot=1, spawn=5, generation=-1)
    assert not late.has_news
    assert not late.is_stopping
    assert not late.joiners_are_ready()


def join(member: Member, say: Callable[[Any], None]) -> None:
    say(member.enter_as_joiner(backend="gloo", timeout=TIMEOUT))
    say(total())
    time.sleep(100)


def test_a_replacement_waits_for_the_generation_that_takes_it_in(crew: Crew) -> None:
    crew.form(0, 0, 1)
    crew.post(Broken(0, "rank 1 died"))
    crew.form(1, 0, 1, spawns={0: 0, 1: 4})
    crew.start(1, join, spawn=5, generation=-1)
    crew.wait_for(Ready)
    crew.form(2, 0)
    assert crew.is_silent(1)
    formed = crew.form(3, 1, spawns={1: 5}, step=7, joiners=(1,))
    assert crew.says(1) == formed.generation
    assert crew.says(1) == 1


def test_the_end_of_the_job_ends_the_wait_for_joiners(crew: Crew) -> None:
    crew.form(0, 0)
    member = member_of(crew)
    future = blocked(member.wait_for_joiners)
    crew.post(Stop("SIGTERM"))
    future.result(SOON)
    assert member.is_stopping


# -- a supervisor that is gone ----------------------------------------------------------------------------------------


def _serve(mouth: Connection) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    Events.create(store)
    Notices(store).append(Formed(Generation(0, {0: 0, 1: 1}, source=0)))
    wakeups = Wakeups()
    mouth.send((store.port, wakeups.port))
    while True:
        wakeups.wait(100)


@pytest.fixture
def server() -> Iterator[tuple[Any, tuple[int, int]]]:
    """A process with a store and doorbells, and their ports."""
    ear, mouth = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_serve, args=(mouth,), daemon=True)
    process.start()
    yield process, ear.recv()
    process.kill()
    process.join()


def kill(process: Any) -> None:
    process.kill()
    process.join()


def test_whoever_waits_for_a_killed_supervisor_is_told(server: tuple[Any, tuple[int, int]]) -> None:
    process, (port, doorbell) = server
    member = Member("127.0.0.1", port, 0, 0, 0, 2, doorbell)
    future = blocked(member.strand, 3)
    kill(process)
    with pytest.raises(CutOffError):
        future.result(SOON)
    assert member.is_broken


@pytest.mark.parametrize("ask", [lambda m: m.announced(1), lambda m: m.enter_next(1, True)])
def test_no_question_goes_to_a_killed_supervisor(
    server: tuple[Any, tuple[int, int]], ask: Callable[[Member], Any]
) -> None:
    process, (port, doorbell) = server
    member = Member("127.0.0.1", port, 0, 0, 0, 2, doorbell)
    kill(process)
    soon(lambda: member.is_broken)
    with pytest.raises(CutOffError):
        ask(member)


def stay(member: Member, say: Callable[[Any], None]) -> None:
    enter_first(member)
    say(total())
    if member.slot == 1:
        time.sleep(100)
    try:
        total()
    except RuntimeError as error:
        say(member.caused_by_peer_loss(error))
    enter_next(member)


def test_a_member_in_a_collective_is_woken_when_the_supervisor_is_killed(server: tuple[Any, tuple[int, int]]) -> None:
    process, (port, doorbell) = server
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
    workers = [
        _CONTEXT.Process(target=_work, args=(port, (slot, slot, 0, 2, doorbell), stay, pipes[slot][1]), daemon=True)
        for slot in range(2)
    ]
    for worker in workers:
        worker.start()
    ears = [ear for ear, _ in pipes]
    assert [ear.recv() for ear in ears if ear.poll(SOON)] == [2, 2]
    kill(process)
    assert ears[0].poll(SOON)
    assert ears[0].recv() is True
    assert ears[0].poll(SOON)
    assert ears[0].recv().startswith("CutOffError")
    for worker in workers:
        kill(worker)
