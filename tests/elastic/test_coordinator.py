"""The coordinator by itself: what it decides, told what happened and when."""

import signal
from dataclasses import replace

import pytest

from lightning_scar.elastic.protocol.messages import (
    RESTART_EXIT_CODE,
    Back,
    Began,
    Broken,
    Ended,
    Event,
    Exited,
    Finish,
    Formed,
    GaveUp,
    Generation,
    Joining,
    Kill,
    Lost,
    Notice,
    Ready,
    Registered,
    Restart,
    SparesWaiting,
    Spawn,
    Stepped,
    Stop,
    StopAsked,
    Stranded,
    Waiting,
)
from lightning_scar.elastic.supervisor.coordinator import Coordinator
from lightning_scar.elastic.supervisor.policy import Policy

#: The death of rank 2 in most of these tests.
KILLED = "rank 2 was killed by SIGKILL"
POLICY = Policy(max_restarts=3, restart_window=3600, hang_timeout=100, stop_timeout=60, kill_grace=5)


class Job:
    """A coordinator with a clock, and what it said."""

    def __init__(self, world_size: int = 3, policy: Policy = POLICY, per_node: int | None = None) -> None:
        self.said: list[str] = []
        self.now = 1000.0
        self.world_size = world_size
        self.spawns: dict[int, int] = {}
        self.generation = Generation(-1, {}, 0)
        self.coordinator = Coordinator(world_size, policy, self.said.append, per_node)
        self.first = self.noted(self.coordinator.start(self.now))

    def noted(self, notices: list[Notice]) -> list[Notice]:
        for notice in notices:
            if isinstance(notice, Spawn):
                self.spawns[notice.slot] = notice.spawn
            elif isinstance(notice, Formed):
                self.generation = notice.generation
        return notices

    def tell(self, *events: Event) -> list[Notice]:
        return [n for event in events for n in self.noted(self.coordinator.handle(event, self.now))]

    def later(self, seconds: float) -> list[Notice]:
        self.now += seconds
        return self.noted(self.coordinator.tick(self.now))

    def train(self, *slots: int) -> list[Notice]:
        """These, or all, begin a training."""
        events: list[Event] = []
        for slot in slots or range(self.world_size):
            events += [Registered(slot, self.spawns[slot]), Began(slot, self.spawns[slot])]
        return self.tell(*events)

    def died(self, slot: int, code: int = -9, tail: str = "") -> list[Notice]:
        return self.tell(Exited(slot, self.spawns[slot], code, tail))

    def waits(self, slot: int, step: int, boundary: bool = False, waited: float = 0.0) -> list[Notice]:
        """At a boundary they leave to take others in, else since their group failed."""
        failure = "" if boundary else "reset by peer"
        return self.tell(Waiting(slot, self.spawns[slot], self.generation.number, step, boundary, waited, failure))

    def all_wait(self, step: int) -> list[Notice]:
        return [notice for slot in self.generation.members for notice in self.waits(slot, step)]

    def strands(self, slot: int, step: int) -> list[Notice]:
        return self.tell(Stranded(slot, self.spawns[slot], self.generation.number, step))

    def is_ready(self, slot: int) -> list[Notice]:
        return self.tell(Registered(slot, self.spawns[slot]), Ready(slot, self.spawns[slot]))


@pytest.fixture
def job() -> Job:
    job = Job()
    job.train()
    return job


# -- starts and ends --------------------------------------------------------------------------------------------------


def test_it_starts_with_a_generation_of_all() -> None:
    assert Job(2).first == [
        Formed(Generation(0, {0: 0, 1: 1}, source=0)),
        Spawn(0, 0, generation=0, attempt=0),
        Spawn(1, 1, generation=0, attempt=0),
    ]


def test_it_ends_when_all_plain_workers_ended_well() -> None:
    job = Job(2)
    assert job.died(0, code=0) == []
    assert job.died(1, code=0) == [Finish(0)]
    assert job.said == []


def test_it_ends_when_all_trainings_ended_well(job: Job) -> None:
    for slot in range(3):
        assert job.tell(Ended(slot, job.spawns[slot])) == []
    assert job.died(0, code=0) + job.died(1, code=0) == []
    assert job.died(2, code=0) == [Finish(0)]


def test_a_script_that_registers_and_never_trains_ends_well() -> None:
    job = Job(1)
    assert job.tell(Registered(0, 0), Exited(0, 0, 0)) == [Finish(0)]


def test_exit_code_0_in_the_middle_of_a_training_is_a_death(job: Job) -> None:
    assert job.died(1, code=0)[0] == Broken(0, "rank 1 exited with code 0 in the middle of the training")


# -- an outage --------------------------------------------------------------------------------------------------------


def test_a_dead_worker_is_replaced_at_once(job: Job) -> None:
    assert job.died(2) == [Broken(0, "rank 2 was killed by SIGKILL"), Spawn(2, 3, generation=-1, attempt=0)]
    assert job.said == ["rank 2 was killed by SIGKILL; starting a replacement"]


def test_survivors_form_a_generation_when_all_are_there(job: Job) -> None:
    job.died(2)
    assert job.waits(0, step=7) == []
    assert job.waits(1, step=8) == [Formed(Generation(1, {0: 0, 1: 1}, source=1, step=8, deaths=KILLED))]


def test_the_lowest_slot_is_the_source_among_equals(job: Job) -> None:
    job.died(0)
    job.waits(2, step=8)
    job.waits(1, step=8)
    assert (job.generation.members, job.generation.source, job.generation.step) == ([1, 2], 1, 8)


def test_a_survivor_may_wait_before_the_death_is_known(job: Job) -> None:
    assert job.waits(0, step=7) == [Broken(0, "rank 0 lost the connection")]
    assert job.waits(1, step=7) == []
    assert job.died(2) == [
        Spawn(2, 3, generation=-1, attempt=0),
        Formed(Generation(1, {0: 0, 1: 1}, source=0, step=7, deaths=KILLED)),
    ]


def test_all_deaths_of_an_outage_are_told(job: Job) -> None:
    job.waits(0, step=7)
    job.died(2)
    job.waits(1, step=7)
    assert job.generation.deaths == KILLED
    job.waits(0, step=9)
    job.died(1, code=1)
    assert (job.generation.members, job.generation.deaths) == ([0], "rank 1 exited with code 1")


def test_several_deaths_of_an_outage_are_told_in_their_order(job: Job) -> None:
    job.died(2)
    job.died(1, code=1)
    job.waits(0, step=7)
    assert job.generation.deaths == f"{KILLED}, rank 1 exited with code 1"


def test_a_member_that_dies_while_it_waits_is_named(job: Job) -> None:
    job.waits(2, step=7)
    job.waits(0, step=7)
    job.died(2)
    job.waits(1, step=7)
    assert (job.generation.members, job.generation.deaths) == ([0, 1], KILLED)


def test_the_death_of_a_replacement_on_its_way_is_none_of_the_generation(job: Job) -> None:
    job.died(2)
    job.waits(0, step=7)
    job.waits(1, step=7)
    job.died(2)
    job.waits(0, step=8)
    job.waits(1, step=8)
    assert (job.generation.number, job.generation.deaths) == (2, "")


def test_waiting_twice_changes_nothing(job: Job) -> None:
    job.died(2)
    assert job.waits(0, step=7) + job.waits(0, step=7) == []
    job.waits(1, step=7)
    assert job.tell(Waiting(0, 0, generation=0, step=7, boundary=False)) == []


def test_events_of_the_dead_are_ignored(job: Job) -> None:
    job.died(2)
    assert job.tell(Exited(2, 2, -9), Waiting(2, 2, 0, 7, False), Began(2, 2)) == []


def test_a_replacement_joins_at_a_step_boundary(job: Job) -> None:
    job.died(2)
    job.waits(0, step=7)
    job.waits(1, step=7)
    assert job.is_ready(2) == [Joining(1, (2,))]
    assert job.waits(1, step=9, boundary=True) == []
    assert job.waits(0, step=9, boundary=True) == [
        Formed(Generation(2, {0: 0, 1: 1, 2: 3}, source=0, step=9, joiners=(2,)))
    ]
    job.now += 61
    assert job.died(2) == [Broken(2, "rank 2 was killed by SIGKILL"), Spawn(2, 4, generation=-1, attempt=0)]


def test_a_replacement_that_was_ready_first_is_announced_to_the_next_generation(job: Job) -> None:
    job.died(2)
    assert job.is_ready(2) == []
    job.waits(0, step=7)
    formed = Formed(Generation(1, {0: 0, 1: 1}, source=0, step=7, deaths=KILLED))
    assert job.waits(1, step=7) == [formed, Joining(1, (2,))]


def test_survivors_behind_the_same_step_take_a_ready_replacement_in_at_once(job: Job) -> None:
    job.died(2)
    job.is_ready(2)
    job.waits(0, step=7, boundary=True)
    job.waits(1, step=7, boundary=True)
    assert job.generation.joiners == (2,)


def test_no_replacement_joins_survivors_at_different_steps(job: Job) -> None:
    job.died(2)
    job.is_ready(2)
    job.waits(0, step=7, boundary=True)
    job.waits(1, step=8, boundary=True)
    assert job.generation.joiners == ()


def test_a_death_in_a_planned_switch_breaks_the_generation(job: Job) -> None:
    job.died(2)
    job.waits(0, step=7)
    job.waits(1, step=7)
    job.is_ready(2)
    assert job.waits(0, step=9, boundary=True) == []
    assert job.died(1)[0] == Broken(1, "rank 1 was killed by SIGKILL")
    deaths = "rank 1 was killed by SIGKILL"
    assert job.generation == Generation(2, {0: 0, 2: 3}, source=0, step=9, joiners=(2,), deaths=deaths)


def test_a_replacement_that_dies_on_its_way_is_replaced_and_nobody_disturbed(job: Job) -> None:
    job.died(2)
    assert job.died(2, code=1) == []
    assert job.later(0.9) == []
    assert job.later(0.2) == [Spawn(2, 4, generation=-1, attempt=0)]


def test_a_slot_that_lived_long_is_filled_at_once_again(job: Job) -> None:
    job.died(2)
    job.now += 61
    assert Spawn(2, 4, generation=-1, attempt=0) in job.died(2)


def test_a_joiner_that_lost_its_generation_before_it_had_the_state_is_a_replacement_again(job: Job) -> None:
    job.died(2)
    job.is_ready(2)
    for slot in (0, 1):
        job.waits(slot, step=7, boundary=True)
    assert job.died(1)[0] == Broken(1, "rank 1 was killed by SIGKILL")
    assert job.tell(Ready(2, job.spawns[2])) == []
    deaths = "rank 1 was killed by SIGKILL"
    assert job.waits(0, step=7) == [Formed(Generation(2, {0: 0}, source=0, step=7, deaths=deaths)), Joining(2, (2,))]


def test_a_joiner_that_had_left_before_it_was_a_replacement_again_takes_part(job: Job) -> None:
    job.died(2)
    job.is_ready(2)
    job.waits(0, step=7, boundary=True)
    job.waits(1, step=7, boundary=True)
    job.waits(2, step=7)
    job.tell(Ready(2, job.spawns[2]))
    job.waits(0, step=8, boundary=True)
    job.waits(1, step=8, boundary=True)
    assert job.generation.joiners == (2,)
    assert job.waits(0, step=9) + job.waits(1, step=9) == [Broken(2, "rank 0 lost the connection")]


def test_all_start_again_when_only_a_joiner_without_state_is_left() -> None:
    job = Job(2)
    job.train()
    job.died(1)
    job.waits(0, step=7, boundary=True)
    job.is_ready(1)
    job.waits(0, step=8, boundary=True)
    assert job.generation.joiners == (1,)
    job.died(0)
    assert Kill(1, job.spawns[1], signal.SIGKILL) in job.tell(Ready(1, job.spawns[1]))


def test_the_training_may_end_before_its_replacement_is_there(job: Job) -> None:
    job.died(2)
    job.waits(0, step=7)
    job.waits(1, step=7)
    for slot in (0, 1):
        job.tell(Ended(slot, job.spawns[slot]))
    job.died(0, code=0)
    assert job.died(1, code=0) == [Kill(2, 3, signal.SIGKILL)]
    assert job.died(2) == [Finish(0)]


# -- all start again --------------------------------------------------------------------------------------------------


def test_plain_workers_are_all_started_again() -> None:
    job = Job(2)
    assert job.died(1, code=1) == [Broken(0, "rank 1 exited with code 1"), Kill(0, 0, signal.SIGTERM)]
    assert job.later(4) == []
    assert job.later(1.1) == [Kill(0, 0, signal.SIGKILL)]
    assert job.later(1) == []
    assert job.died(0) == [
        Formed(Generation(1, {0: 2, 1: 3}, source=0)),
        Spawn(0, 2, generation=1, attempt=1),
        Spawn(1, 3, generation=1, attempt=1),
    ]
    assert job.said == ["rank 1 exited with code 1; starting all workers again"]


def test_workers_in_their_start_up_are_killed_at_once() -> None:
    job = Job(3)
    job.train(0)
    job.tell(Registered(1, 1))
    assert job.died(2)[1:] == [Kill(0, 0, signal.SIGKILL), Kill(1, 1, signal.SIGKILL)]


def test_a_plain_worker_that_ended_well_starts_again_with_the_others() -> None:
    job = Job(2)
    job.died(0, code=0)
    assert [type(notice) for notice in job.died(1, code=1)] == [Broken, Formed, Spawn, Spawn]


def test_all_start_again_when_nobody_survives(job: Job) -> None:
    job.died(0)
    job.died(1)
    assert [n for n in job.died(2) if isinstance(n, Kill)] == [Kill(s, job.spawns[s], signal.SIGKILL) for s in (0, 1)]
    job.died(0)
    assert [n.attempt for n in job.died(1) if isinstance(n, Spawn)] == [1, 1, 1]
    assert job.generation.number == 1


def test_who_has_finished_has_taken_the_state_along(job: Job) -> None:
    for slot in range(3):
        job.tell(Ended(slot, slot))
    job.died(0, code=0)
    job.died(1, code=0)
    assert [n.attempt for n in job.died(2) if isinstance(n, Spawn)] == [1, 1, 1]
    assert job.said[1:] == ["nobody is left who has the state; the last save counts, if there is one"]


def test_stranded_workers_leave_their_state_and_start_again(job: Job) -> None:
    assert job.died(2) == [Broken(0, "rank 2 was killed by SIGKILL"), Spawn(2, 3, generation=-1, attempt=0)]
    job.strands(0, step=7)
    assert job.waits(1, step=8) == [
        Restart(0, keeper=1, deaths="rank 2 was killed by SIGKILL"),
        Kill(2, 3, signal.SIGKILL),
    ]
    assert job.died(0, code=RESTART_EXIT_CODE) + job.died(2) == []
    assert [type(n) for n in job.died(1, code=RESTART_EXIT_CODE)] == [Formed, Spawn, Spawn, Spawn]


def test_nobody_keeps_a_state_that_nobody_has(job: Job) -> None:
    for slot in (0, 1):
        job.strands(slot, step=-1)
    assert Restart(0, keeper=-1) in job.strands(2, step=-1)


def test_a_keeper_that_does_not_end_is_killed(job: Job) -> None:
    for slot in (0, 1, 2):
        job.strands(slot, step=5)
    assert job.later(59) == []
    assert job.later(1) == [Kill(slot, slot, signal.SIGKILL) for slot in range(3)]
    assert job.later(1) == []


def test_after_the_training_survivors_are_left_to_strand(job: Job) -> None:
    for slot in range(3):
        job.tell(Ended(slot, slot))
    assert job.died(2) == [Broken(0, "rank 2 was killed by SIGKILL")]
    job.strands(0, step=9)
    assert job.strands(1, step=9) == [Restart(0, keeper=0, deaths="rank 2 was killed by SIGKILL")]


def test_numbers_never_come_again() -> None:
    job = Job(2)
    job.died(0, code=1)
    spawns = [n.spawn for n in job.first + job.died(1) + job.later(9) if isinstance(n, Spawn)]
    assert len(set(spawns)) == len(spawns) == 4


# -- hangs ------------------------------------------------------------------------------------------------------------


def test_who_keeps_the_others_waiting_is_killed(job: Job) -> None:
    job.waits(0, step=7, waited=99)
    job.waits(1, step=7, waited=98)
    assert job.later(1) == []
    assert job.later(1.5) == [Kill(2, 2, signal.SIGKILL)]
    assert job.later(1) == []
    assert [type(n) for n in job.died(2)] == [Spawn, Formed]
    assert job.said == ["rank 2 hung and was killed; starting a replacement"]


def test_a_worker_is_given_time_to_notice(job: Job) -> None:
    job.waits(0, step=7, waited=1000)
    assert job.later(1.9) == []
    assert len(job.later(0.2)) == 2


def test_nobody_hangs_while_nobody_waits(job: Job) -> None:
    assert job.later(100_000) == []


@pytest.mark.parametrize("died", [(2,), (1, 2)])
def test_survivors_in_a_long_phase_of_their_own_are_not_killed(job: Job, died: tuple[int, ...]) -> None:
    for slot in died:
        job.died(slot)
    assert job.later(101) + job.later(100_000) == []
    ranks = "0" if len(died) == 2 else "0, 1"
    assert f"killed by SIGKILL; for 100 s nothing was heard of rank {ranks}." in job.said[-1]
    assert len([line for line in job.said if "nothing was heard" in line]) == 1


def test_a_survivor_is_waited_for_since_the_first_of_them_waits(job: Job) -> None:
    job.died(2)
    job.later(5000)
    job.waits(0, step=7)
    assert job.later(99) == []
    assert job.later(2) == [Kill(1, 1, signal.SIGKILL)]


def test_a_survivor_whose_peer_died_while_it_waited_is_waited_for_no_more(job: Job) -> None:
    job.died(2)
    job.waits(0, step=7)
    job.died(0)
    assert job.later(5000) == []


# -- a replacement that hangs ---------------------------------------------------------------------------------------


def started(seconds: float, policy: Policy = POLICY) -> Job:
    """A job whose slowest worker took so long to its first step, and whose rank 2 died then."""
    job = Job(3, policy)
    job.train()
    for slot in range(3):
        job.later(seconds / 3)
        job.tell(Stepped(slot, job.spawns[slot]))
    job.died(2)
    job.waits(0, step=7)
    job.waits(1, step=7)
    return job


@pytest.mark.parametrize(("took", "patience"), [(12, 60), (90, 180)])
def test_a_replacement_that_hangs_in_its_set_up_is_replaced(took: float, patience: float) -> None:
    job = started(took)
    job.tell(Registered(2, job.spawns[2]))
    assert job.later(patience - 1) == []
    assert job.later(2) == [Kill(2, 3, signal.SIGKILL)]
    assert job.later(1) == []
    assert job.died(2) == [Spawn(2, 4, generation=-1, attempt=0)]
    how = f"was not ready within {patience} s (the first start took {took} s) and was killed"
    assert job.said[1:] == [f"rank 2 {how}; starting a replacement"]


def test_replacements_that_hang_again_and_again_use_the_budget_up() -> None:
    job = started(12, replace(POLICY, max_restarts=2))
    for _ in range(2):
        assert [type(notice) for notice in job.later(61)] == [Kill]
        last = job.died(2)
    assert Stop("rank 2 was not ready within 60 s (the first start took 12 s) and was killed") in last


def test_a_replacement_that_is_ready_may_wait() -> None:
    job = started(12)
    job.is_ready(2)
    assert job.later(1000) == []


def test_nobody_knows_how_long_a_replacement_takes_before_the_first_step(job: Job) -> None:
    job.died(2)
    assert job.later(99) == []


def test_the_first_step_of_a_replacement_says_nothing_of_the_start() -> None:
    job = started(12)
    job.later(59)
    job.is_ready(2)
    for slot in (0, 1):
        job.waits(slot, step=9, boundary=True)
    job.later(100)
    job.tell(Stepped(2, job.spawns[2]))
    job.died(2)
    assert [type(notice) for notice in job.later(61)] == [Kill]


# -- a group that fails though nobody dies --------------------------------------------------------------------------


def test_a_group_that_fails_by_itself_forms_again(job: Job) -> None:
    for slot in range(3):
        job.waits(slot, step=7, waited=200)
    assert job.generation.number == 1
    assert job.said == ["the group failed, though no worker died (rank 0: reset by peer); it forms again"]


def test_a_group_that_fails_again_and_again_waits_longer_each_time_and_ends_the_job(job: Job) -> None:
    job.all_wait(step=7)
    for number, pause in ((1, 1), (2, 2)):
        assert Broken(number, "rank 0 lost the connection") in job.all_wait(step=7)
        assert job.said[-1].endswith(f"it forms again in {pause} s")
        assert job.later(pause - 0.1) == []
        assert job.later(0.2) == [Formed(Generation(number + 1, {0: 0, 1: 1, 2: 2}, source=0, step=7))]
    why = "the group failed, though no worker died"
    assert job.all_wait(step=7)[-1] == Stop(why, disbands=True)
    # Who waits saves what it has.
    assert job.later(10) == []
    assert [notice for slot in range(3) for notice in job.died(slot, code=1)] == [Finish(1)]
    assert job.said[-1].startswith(f"the job failed: {why}.\nAll workers live, but cannot work together")
    assert "    rank 0: reset by peer\n" in job.said[-1]
    assert "--max-restarts 3" in job.said[-1]


@pytest.mark.parametrize("trains", [True, False])
def test_without_a_step_in_between_no_failure_of_the_group_is_forgotten(job: Job, trains: bool) -> None:
    """A connection that cannot be made may take half an hour to fail."""
    told: list[Notice] = []
    for i in range(1, 7):
        told += job.later(1800) + job.all_wait(step=i if trains else 1)
    assert any(isinstance(notice, Stop) for notice in told) is not trains


def test_a_group_that_is_left_as_planned_has_not_failed(job: Job) -> None:
    """Members wait for replacements outside of a group, and one may still be in a collective of the others."""
    for _ in range(9):
        job.tell(Waiting(0, 0, job.generation.number, step=7, boundary=False))
        job.waits(1, step=7)
        job.waits(2, step=7)
    assert job.said == []
    assert job.generation.number == 9


def test_a_failure_in_which_a_member_died_counts_once() -> None:
    job = Job(3, replace(POLICY, max_restarts=1))
    job.train()
    job.all_wait(step=7)
    assert job.waits(0, step=8) == [Broken(1, "rank 0 lost the connection")]
    job.waits(1, step=8)
    assert Stop(KILLED) in job.died(2)
    assert len([line for line in job.said if "no worker died" in line]) == 1


def test_a_group_that_cannot_form_to_stop_together_is_not_formed_for_ever(job: Job) -> None:
    job.tell(StopAsked(15, 0))
    said = [notice for _ in range(4) for notice in [*job.all_wait(step=7), *job.later(9)]]
    assert said[-1] == Stop("the group failed, though no worker died", disbands=True)
    assert job.all_wait(step=7) == []


def test_starts_that_fail_again_and_again_though_nobody_died_wait_longer_each_time(job: Job) -> None:
    pauses = []
    for _ in range(3):
        for slot in range(3):
            job.strands(slot, step=-1)
        started = [type(n) for slot in range(3) for n in job.died(slot, code=RESTART_EXIT_CODE)].count(Spawn)
        pauses.append(0 if started else next(s for s in range(1, 9) if job.later(1)))
    assert pauses == [0, 1, 2]


# -- giving up --------------------------------------------------------------------------------------------------------


def test_beyond_max_restarts_survivors_are_stopped_and_the_cause_is_shown() -> None:
    job = Job(3, replace(POLICY, max_restarts=0))
    job.train()
    assert job.died(2, code=1, tail="Traceback\nValueError: boom\n") == [
        Broken(0, "rank 2 exited with code 1"),
        Stop("rank 2 exited with code 1"),
    ]
    assert job.died(0, code=0) == []
    assert job.died(1, code=0) == [Finish(1)]
    for expected in ("rank 2 exited with code 1", "    ValueError: boom", "--max-restarts is 0"):
        assert expected in job.said[-1]


def test_survivors_that_do_not_stop_are_killed() -> None:
    job = Job(2, replace(POLICY, max_restarts=0))
    job.train()
    job.died(0)
    assert job.later(61) == [Kill(1, 1, signal.SIGKILL)]
    assert job.died(1) == [Finish(1)]


def test_survivors_of_an_outage_come_together_to_stop() -> None:
    job = Job(3, replace(POLICY, max_restarts=0))
    job.train()
    job.died(2)
    job.waits(0, step=7)
    assert job.waits(1, step=8) == [Formed(Generation(1, {0: 0, 1: 1}, source=1, step=8, deaths=KILLED))]


def test_deaths_in_one_outage_count_once() -> None:
    job = Job(3, replace(POLICY, max_restarts=1))
    job.train()
    job.died(2)
    assert not any(isinstance(n, Stop) for n in job.died(1))


def test_failures_outside_the_window_are_forgotten() -> None:
    job = Job(1, replace(POLICY, max_restarts=1, restart_window=100))
    for _ in range(5):
        assert any(isinstance(n, Spawn) for n in job.died(0))
        job.now += 101
    job.died(0)
    assert job.died(0)[-1] == Finish(1)


def test_a_worker_may_say_that_the_job_cannot_go_on(job: Job) -> None:
    assert job.tell(GaveUp(1, 1, "no batch is left")) == [Stop("no batch is left")]
    for slot in range(3):
        job.tell(Ended(slot, slot))
    assert [n for slot in range(3) for n in job.died(slot, code=0)] == [Finish(1)]
    assert "no batch is left" in job.said[-1]


def test_workers_that_each_hold_a_part_of_the_state_are_all_started_again(job: Job) -> None:
    job.tell(*(Began(slot, job.spawns[slot], can_take_in=False) for slot in range(3)))
    assert job.died(2) == [Broken(0, KILLED)]
    assert job.said == [f"{KILLED}; starting all workers again, since each holds a part of the state"]
    # They save it first.
    assert job.later(30) == []
    job.strands(0, 7)
    assert job.strands(1, 7) == [Restart(0, 0, KILLED)]
    assert job.died(0, RESTART_EXIT_CODE) == []
    assert [notice.slot for notice in job.died(1, RESTART_EXIT_CODE) if isinstance(notice, Spawn)] == [0, 1, 2]
    assert len(job.said) == 1


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_the_others_go_on_without_a_lost_node_until_it_is_back(job: Job) -> None:
    assert job.tell(Lost(1, (1, 2))) == [Broken(0, "node 1 was lost")]
    assert job.said == [
        "node 1 was lost; the job goes on without it. Start its supervisor again within 600 s, there or on another "
        "host, with --node-rank 1"
    ]
    assert job.waits(0, step=7) == [Formed(Generation(1, {0: 0}, source=0, step=7, deaths="node 1 was lost"))]
    assert job.later(100) == []
    assert job.tell(Back(1, (1, 2))) == [Spawn(1, 3, generation=-1, attempt=0), Spawn(2, 4, generation=-1, attempt=0)]
    assert job.said[1:] == ["node 1 is back"]
    assert job.is_ready(1) + job.is_ready(2) == [Joining(1, (1,)), Joining(1, (1, 2))]
    assert job.waits(0, step=40, boundary=True)[0] == Formed(
        Generation(2, {0: 0, 1: 3, 2: 4}, source=0, step=40, joiners=(1, 2))
    )


def test_a_start_of_all_workers_waits_for_a_lost_node(job: Job) -> None:
    job.tell(Lost(1, (2,)))
    job.strands(0, 7)
    assert job.strands(1, 7)[0] == Restart(0, 0, "node 1 was lost")
    assert job.died(0, RESTART_EXIT_CODE) + job.died(1, RESTART_EXIT_CODE) + job.later(100) == []
    assert [notice.slot for notice in job.tell(Back(1, (2,))) if isinstance(notice, Spawn)] == [0, 1, 2]


def test_a_node_lost_before_the_training_began_ends_all_until_it_is_back() -> None:
    job = Job()
    assert job.tell(Lost(1, (2,))) == [Broken(0, "node 1 was lost"), Kill(0, 0, 15), Kill(1, 1, 15)]
    assert "all workers are started again when it is back" in job.said[0]
    assert job.died(0, -15) + job.died(1, -15) + job.later(100) == []
    assert [notice.slot for notice in job.tell(Back(1, (2,))) if isinstance(notice, Spawn)] == [0, 1, 2]


def test_what_a_lost_node_says_later_counts_no_more(job: Job) -> None:
    spawn = job.spawns[2]
    job.tell(Lost(1, (2,)))
    job.waits(0, step=7)
    job.waits(1, step=7)
    job.tell(Back(1, (2,)))
    assert job.tell(Waiting(2, spawn, 0, 7, False), Ready(2, spawn), Exited(2, spawn, -9)) == []
    assert job.is_ready(2) == [Joining(1, (2,))]


def test_lost_nodes_are_failures_that_count() -> None:
    job = Job(2, replace(POLICY, max_restarts=1))
    job.train()
    job.tell(Lost(1, (1,)))
    job.waits(0, step=7)
    job.tell(Back(1, (1,)))
    assert job.tell(Lost(1, (1,))) == [Stop("node 1 was lost")]
    assert job.died(0, code=0) == [Broken(1, "rank 0 exited with code 0 in the middle of the training"), Finish(1)]
    assert "--max-restarts 1" in job.said[-1]


def test_a_node_lost_for_good_ends_the_job(job: Job) -> None:
    job.tell(Lost(1, (2,)))
    job.waits(0, step=7)
    job.waits(1, step=7)
    how = "was lost and has not come back within 600 s"
    assert job.tell(Lost(1, (2,), how, for_good=True)) == [Stop(f"node 1 {how}")]
    job.died(0, code=0)
    assert job.died(1, code=0) == [Finish(1)]
    assert job.said[-1].startswith(f"the job failed: node 1 {how}.\nNobody else can fill its slots.")


def test_a_node_lost_for_good_at_once_ends_the_job(job: Job) -> None:
    lost = Lost(1, (2,), for_good=True)
    assert job.tell(lost) == [Broken(0, "node 1 was lost"), Stop("node 1 was lost")]


def test_a_node_whose_workers_are_done_may_go() -> None:
    job = Job(2)
    assert job.died(1, code=0) + job.tell(Lost(1, (1,))) + job.later(10) == []
    assert job.died(0, code=0) == [Finish(0)]
    assert job.said == []


@pytest.mark.parametrize("is_given_up_before", [True, False])
def test_a_node_whose_workers_are_done_is_missed_when_all_start_again(is_given_up_before: bool) -> None:
    job = Job(2)
    job.died(1, code=0)
    final = Lost(1, (1,), "was lost and has not come back within 600 s", for_good=True)
    job.tell(Lost(1, (1,)), *([final] if is_given_up_before else []))
    assert job.said == []
    job.died(0)
    assert job.said[0] == "rank 0 was killed by SIGKILL; starting all workers again"
    if not is_given_up_before:
        assert job.said[1].startswith("node 1 was lost; all workers are started again when it is back.")
        assert job.later(100) == []
        job.tell(final)
    assert job.said[-1].startswith(f"the job failed: {final.reason}.")


def test_a_node_that_is_back_before_it_was_missed_is_not_mentioned() -> None:
    job = Job(2)
    job.died(1, code=0)
    job.tell(Lost(1, (1,)), Back(1, (1,)))
    job.died(0)
    assert job.said == ["rank 0 was killed by SIGKILL; starting all workers again"]
    assert job.spawns == {0: 2, 1: 3}


def test_what_is_to_be_waited_for_is_told_anew_when_it_changes(job: Job) -> None:
    job.tell(Lost(1, (2,)))
    job.died(0)
    job.died(1)
    job.tell(Back(1, (2,)))
    assert [line.split(".")[0] for line in job.said] == [
        "node 1 was lost; the job goes on without it",
        "rank 0 was killed by SIGKILL; starting a replacement",
        "rank 1 was killed by SIGKILL; starting all workers again",
        "nobody is left who has the state; the last save counts, if there is one",
        "node 1 was lost; all workers are started again when it is back",
        "node 1 is back",
    ]


def test_a_worker_that_counts_as_dead_cannot_ask_the_job_to_stop(job: Job) -> None:
    spawn = job.spawns[2]
    job.tell(Lost(1, (2,)))
    job.waits(0, step=7)
    job.waits(1, step=7)
    assert job.tell(StopAsked(15, slot=2, spawn=spawn)) == []
    assert job.tell(StopAsked(15, slot=1, spawn=job.spawns[1])) == [Stop("SIGTERM")]


def test_a_shard_that_dies_behind_the_end_of_the_training_does_not_undo_it() -> None:
    job = Job(2)
    job.train()
    job.tell(*(Began(slot, job.spawns[slot], can_take_in=False) for slot in range(2)))
    job.died(1)
    job.tell(Ended(0, job.spawns[0]))
    assert job.died(0, code=0) == [Finish(0)]


def test_a_connection_that_is_lost_without_a_death_is_mentioned() -> None:
    job = Job(2)
    job.train()
    job.tell(*(Began(slot, job.spawns[slot], can_take_in=False) for slot in range(2)))
    job.strands(0, 7)
    job.strands(1, 7)
    assert job.said == ["the group cannot be put together again where it failed; starting all workers again"]


# -- signals ----------------------------------------------------------------------------------------------------------


def test_a_training_is_told_to_stop(job: Job) -> None:
    assert job.tell(StopAsked(15, 0)) == [Stop("SIGTERM")]
    assert job.died(0, code=0) + job.died(1, code=0) == [
        Broken(0, "rank 0 exited with code 0 in the middle of the training")
    ]
    assert job.died(2, code=0) == [Finish(143)]


def test_plain_workers_get_the_signal_itself() -> None:
    job = Job(2)
    assert job.tell(StopAsked(2, 0)) == [Stop("SIGINT"), Kill(0, 0, 2), Kill(1, 1, 2)]
    job.died(0, code=0)
    assert job.died(1, code=1)[-1:] == [Finish(130)]


def test_a_worker_whose_training_is_over_takes_the_signal_itself(job: Job) -> None:
    job.tell(Ended(0, 0))
    assert job.tell(StopAsked(15, 0)) == [Stop("SIGTERM"), Kill(0, 0, signal.SIGTERM)]
    assert job.tell(Ended(1, 1)) == [Kill(1, 1, signal.SIGTERM)]


def test_a_second_interrupt_of_the_same_agent_kills(job: Job) -> None:
    job.tell(StopAsked(2, 0))
    assert job.tell(StopAsked(2, 0), StopAsked(2, 1), StopAsked(2)) == []
    job.now += 2
    assert job.tell(StopAsked(2), StopAsked(2, 2), StopAsked(15, 0)) == []
    assert job.tell(StopAsked(2, 0)) == [Kill(slot, slot, signal.SIGKILL) for slot in range(3)]


def test_a_stop_while_all_start_again() -> None:
    job = Job(2)
    job.died(1, code=1)
    job.tell(StopAsked(15, 0))
    assert job.died(0) == [Finish(143)]


def test_a_replacement_is_not_waited_for_at_a_stop(job: Job) -> None:
    job.died(2)
    assert job.tell(StopAsked(15, 0)) == [Stop("SIGTERM"), Kill(2, 3, signal.SIGKILL)]


def test_a_stop_while_a_keeper_leaves_its_state_forms_no_group(job: Job) -> None:
    job.waits(0, step=7)
    job.waits(1, step=7)
    assert Restart(0, keeper=0) in job.strands(2, step=7)
    job.died(2, code=RESTART_EXIT_CODE)
    assert job.tell(StopAsked(15, 0)) == [Stop("SIGTERM")]
    job.died(0, code=RESTART_EXIT_CODE)
    assert job.died(1, code=RESTART_EXIT_CODE) == [Finish(143)]


def test_a_program_that_fails_before_it_trains_is_not_started_again() -> None:
    job = Job(2)
    job.tell(Registered(0, 0), Registered(1, 1))
    notices = job.died(1, code=1)
    assert Stop("rank 1 exited with code 1") in notices
    assert not [notice for notice in notices if isinstance(notice, Spawn)]


def test_a_program_that_fails_since_another_worker_was_lost_is_started_again() -> None:
    job = Job(2)
    job.tell(Registered(0, 0), Registered(1, 1))
    # The death of its peer is noticed later, e.g. that of a whole node.
    assert job.strands(0, step=-1) == [Broken(0, "rank 0 lost the connection")]
    assert job.died(0, code=1) == [Kill(1, 1, signal.SIGKILL)]
    job.tell(Lost(1, (1,)))
    assert [notice.slot for notice in job.tell(Back(1, (1,))) if isinstance(notice, Spawn)] == [0, 1]


# -- slots that move to another node ----------------------------------------------------------------------------------


def spawned(notices: list[Notice]) -> list[tuple[int, int]]:
    """The slots that are filled, and on which nodes."""
    return [(notice.slot, notice.node) for notice in notices if isinstance(notice, Spawn)]


def broken(max_restarts: int = 9, spares: int = 1) -> Job:
    """Slot 2, of node 1, has died, and its first replacement too."""
    job = Job(4, replace(POLICY, max_restarts=max_restarts), per_node=2)
    job.train()
    job.tell(SparesWaiting(0, spares), SparesWaiting(1, 1))
    assert spawned(job.died(2)) == [(2, 1)]
    assert spawned(job.died(2, code=1) + job.later(60)) == [(2, 1)]
    return job


def test_a_slot_that_cannot_start_moves_to_a_spare_elsewhere() -> None:
    job = broken()
    assert spawned(job.died(2, code=1)) == [(2, 0)]
    assert job.said[-1] == (
        "rank 2 exited with code 1; a spare of node 0 takes its place, since it cannot start on its own node"
    )
    # There it stays.
    job.is_ready(2)
    assert spawned(job.died(2) + job.later(60)) == [(2, 0)]


def test_a_slot_stays_where_no_spare_waits_elsewhere() -> None:
    job = broken(spares=0)
    assert spawned(job.died(2, code=1) + job.later(60)) == [(2, 1)]


def test_a_replacement_that_gets_ready_proves_its_node() -> None:
    job = broken()
    job.is_ready(2)
    assert spawned(job.died(2) + job.later(60)) == [(2, 1)]


def test_each_spare_serves_once() -> None:
    job = broken()
    job.died(2, code=1)
    job.died(3)
    for _ in range(2):
        assert spawned(job.died(3, code=1) + job.later(60)) == [(3, 1)]


def test_a_slot_that_moved_outlives_its_own_node_and_not_the_other_one() -> None:
    job = broken()
    job.died(2, code=1)
    job.tell(Lost(1, (2, 3)))
    assert 2 in job.coordinator._crew
    assert 3 not in job.coordinator._crew
    job.tell(Lost(0, (0, 1)))
    assert 2 not in job.coordinator._crew


def test_a_new_start_leaves_a_slot_where_it_moved() -> None:
    job = broken()
    job.died(2, code=1)
    # The members, and then the replacements that have nobody to join.
    notices = [notice for slot in (0, 1, 3, *range(4)) for notice in job.died(slot)] + job.later(60)
    again = [notice for notice in notices if isinstance(notice, Spawn) and notice.attempt == 1]
    assert spawned(list(again)) == [(0, 0), (1, 0), (2, 0), (3, 1)]
