"""Decides what happens when workers come, fail, wait and go. It starts no process, and has no store and no clock.

The rules, in the order of an outage:

1. A worker dies (:class:`Exited`), or one says that its group failed (:class:`Waiting`, :class:`Stranded`). The
   generation is broken, and everybody is told (:class:`Broken`).
2. If all survivors are in a training, the dead one's slot is filled again (:class:`Spawn`) while they go on. If one is
   still in its start-up, or speaks no protocol, nothing can be kept: all are ended and started again.
3. Survivors that wait form the next generation (:class:`Formed`) as soon as all are there. One for which the others
   have waited too long hangs, and is killed. If one is stranded, somebody leaves the state and all start again
   (:class:`Restart`).
4. A replacement that is :class:`Ready` is announced (:class:`Joining`). The members leave their generation at a step
   that they agree on; all stand behind the same step then, and the next generation takes the replacement in.

When a node is :class:`Lost` all its workers died, and their slots stay empty until it is :class:`Back`.
Failures beyond ``max_restarts`` and signals end the job: whoever has something to save is told to (:class:`Stop`).
"""

import signal
from collections.abc import Callable

from lightning_scar.elastic.protocol.messages import (
    Back,
    Began,
    Broken,
    Change,
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
    Spawn,
    Stop,
    StopAsked,
    Stranded,
    Waiting,
)
from lightning_scar.elastic.supervisor.lost_nodes import Absences
from lightning_scar.elastic.supervisor.policy import BackOff, Budget, Policy, ending, exhausted, last_words, signal_name
from lightning_scar.elastic.supervisor.workers import Phase, Present, Remedy, Worker, furthest, remedy_for

_NOBODY_ELSE = "Nobody else can fill its slots. Start the job again when the node is back.\n"
#: Signals that come closer together are one request to stop.
_IMPATIENCE_SECONDS = 1.0


class Coordinator:
    """The one place where decisions are made. Events go in, with the time; notices come out.

    Args:
        world_size: How many slots there are.
        policy: What the user chose.
        say: Called with each line that the user should read.

    """

    def __init__(self, world_size: int, policy: Policy, say: Callable[[str], None]) -> None:
        self._slots = frozenset(range(world_size))
        self._policy = policy
        self._say = say
        self._budget = Budget(policy)
        self._back_off = BackOff()
        self._absences = Absences(policy, say)
        self._notices: list[Notice] = []
        self._phase = Phase.OVER
        self._now = 0.0
        self._attempt = -1
        self._spawns = 0
        self._generations = 0
        self._living: dict[int, Worker] = {}
        self._code = 0
        self._report = ""
        #: When which agent was first told by a signal to stop.
        self._stop_asked_at: dict[int, float] = {}
        #: When workers that are on their way out are killed.
        self._deadline = float("inf")

    def start(self, now: float) -> list[Notice]:
        """Starts the job."""
        self._now = now
        self._start_all()
        return self._posted()

    def take(self, event: Event | Change, now: float) -> list[Notice]:
        """Takes in what happened."""
        self._now = now
        match event:
            case Lost():
                self._lost(event)
            case Back():
                self._absences.end(event)
            case StopAsked(slot=-1):
                self._stop_asked(event)
            case _:
                worker = self._living.get(event.slot)
                if worker is not None and worker.spawn == event.spawn:
                    self._hear(worker, event)
        self._settle()
        return self._posted()

    def tick(self, now: float) -> list[Notice]:
        """Does what is due by now."""
        self._now = now
        self._settle()
        return self._posted()

    def _posted(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        return notices

    def _post(self, notice: Notice) -> None:
        self._notices.append(notice)

    # -- a start of all workers -------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        self._phase = Phase.RUNNING
        self._attempt += 1
        #: Slots whose worker ended well.
        self._finished: set[int] = set()
        #: Slots without which the training goes on, until their replacements have joined.
        self._replaced: set[int] = set()
        #: When a slot may be filled again, if its node is there.
        self._due: dict[int, float] = {}
        #: Whether workers were told to exit, to be started again: they form no group any more, not even to stop.
        self._is_disbanded = False
        first = self._spawns
        self._form(Generation(self._generations, {slot: first + slot for slot in sorted(self._slots)}, source=0))
        for slot in sorted(self._slots):
            self._spawn(slot, self._present.generation.number)

    def _spawn(self, slot: int, generation: int) -> None:
        self._living[slot] = Worker(slot, self._spawns, self._now, is_member=generation >= 0)
        self._post(Spawn(slot, self._spawns, generation, self._attempt))
        self._spawns += 1

    def _form(self, generation: Generation) -> None:
        self._present = Present(generation)
        self._generations = generation.number + 1
        self._post(Formed(generation))

    # -- what workers say -------------------------------------------------------------------------------------------

    def _hear(self, worker: Worker, event: Event) -> None:
        match event:
            case Registered():
                worker.registered = True
            case Began():
                worker.began, worker.ended, worker.can_take_in = True, False, event.can_take_in
            case Ended():
                worker.ended = True
            case Ready():
                self._hear_ready(worker)
            case Waiting() | Stranded():
                self._hear_leaving(worker, event)
            case GaveUp() if self._phase is Phase.RUNNING:
                self._give_up(event.reason)
            case Exited():
                self._hear_exit(worker, event)
            case StopAsked():
                self._stop_asked(event)
            case _:
                pass

    def _hear_ready(self, worker: Worker) -> None:
        if worker.is_member:
            # It was taken in, and the generation broke before it had the state: it is a replacement once more.
            worker.is_member, worker.left = False, None
            self._replaced.add(worker.slot)
            self._break(f"rank {worker.slot} lost the connection")
        worker.ready = True
        self._announce_ready()

    def _hear_leaving(self, worker: Worker, event: Waiting | Stranded) -> None:
        if not self._present.is_left_by(worker, event):
            return
        worker.left = event
        self._present.leave(self._now)
        # Members that stand behind a step have left to take joiners in: nothing failed.
        if isinstance(event, Stranded) or not event.boundary:
            self._break(f"rank {worker.slot} lost the connection")

    def _hear_exit(self, worker: Worker, event: Exited) -> None:
        del self._living[worker.slot]
        how = "hung and was killed" if worker.hung else ending(event.code)
        if event.code == 0 and (worker.ended or not worker.began):
            self._finished.add(worker.slot)
            return
        if worker.is_member:
            # Survivors often notice before the process is gone; they are told who it was all the same.
            self._present.deaths.append(f"rank {worker.slot} {how}")
            self._break(self._present.deaths[-1])
        if self._phase is Phase.RUNNING:
            self._died(worker, event, how)

    def _died(self, worker: Worker, event: Exited, how: str) -> None:
        self._due[worker.slot] = self._now + self._back_off.pause(worker.slot, self._now - worker.born)
        failure = f"rank {worker.slot} {how}"
        if worker.is_at_fault(event.code, is_first_start=self._attempt == 0):
            self._give_up(failure, last_words(worker.slot, event.code, event.tail))
            return
        # A replacement on its way in belongs to no generation: its death is always one more.
        if self._is_within_budget(is_new=not worker.is_member):
            self._say(f"{failure}; {remedy_for(self._members()).value}")
        else:
            self._give_up(failure, last_words(worker.slot, event.code, event.tail) + exhausted(self._policy))

    def _break(self, reason: str) -> None:
        if self._present.end(self._now):
            self._post(Broken(self._present.generation.number, reason))

    def _is_within_budget(self, is_new: bool) -> bool:
        return self._present.is_within(self._budget, self._now, is_new)

    # -- what follows from it ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self._phase is Phase.RUNNING:
            self._settle_running()
        if self._phase in (Phase.RESTARTING, Phase.STOPPING):
            self._settle_leaving()

    def _settle_running(self) -> None:
        members = self._members()
        unfinished = self._slots - self._finished
        missing = unfinished - self._living.keys()
        remedy = remedy_for(members)
        if not members and (not unfinished or (self._finished and unfinished <= self._replaced)):
            # The training ended, perhaps without its replacements: there is nothing left that they could join.
            self._leave(Phase.STOPPING, grace=0)
        elif not members or (missing and remedy is Remedy.RESTART):
            self._leave(Phase.RESTARTING, grace=self._policy.kill_grace)
        else:
            if remedy in (Remedy.REPLACEMENT, Remedy.RESTART_OF_SHARDS):
                self._replaced |= missing
            if remedy is Remedy.REPLACEMENT:
                self._fill(missing)
            self._regroup(members)

    def _members(self) -> list[Worker]:
        return [worker for _, worker in sorted(self._living.items()) if worker.is_member]

    def _fill(self, missing: frozenset[int]) -> None:
        for slot in sorted(missing - self._absences.slots):
            if self._now >= self._due.get(slot, 0.0):
                self._spawn(slot, generation=-1)

    def _regroup(self, members: list[Worker]) -> None:
        left = [worker.left for worker in members if worker.left is not None]
        if len(left) < len(members):
            self._kill_hanging(members)
        elif any(isinstance(how, Stranded) for how in left):
            self._restart_stranded(members)
        elif left:
            self._form_next(members)

    def _form_next(self, members: list[Worker]) -> None:
        source, step = furthest(members)
        places = {(worker.left.step, worker.left.boundary) for worker in members if isinstance(worker.left, Waiting)}
        can_join = places == {(step, True)}
        joiners = [worker for _, worker in sorted(self._living.items()) if worker.ready and can_join]
        for worker in members:
            worker.left = None
        for worker in joiners:
            worker.is_member, worker.ready, worker.began = True, False, True
        spawns = {worker.slot: worker.spawn for worker in self._members()}
        slots = tuple(worker.slot for worker in joiners)
        self._replaced.difference_update(slots)
        self._form(Generation(self._generations, spawns, source, step, slots, ", ".join(self._present.deaths)))
        self._announce_ready()

    def _announce_ready(self) -> None:
        ready = tuple(sorted(slot for slot, worker in self._living.items() if worker.ready))
        if ready and not self._present.is_broken and self._phase is Phase.RUNNING:
            self._post(Joining(self._present.generation.number, ready))

    def _kill_hanging(self, members: list[Worker]) -> None:
        for worker in self._present.hanging(members, self._now, self._policy.hang_timeout):
            worker.hung = True
            self._kill(worker, signal.SIGKILL)

    def _restart_stranded(self, members: list[Worker]) -> None:
        if self._phase is Phase.STOPPING:
            self._kill_all()
            return
        stranded = next(worker.slot for worker in members if isinstance(worker.left, Stranded))
        if not self._is_within_budget(is_new=False):
            self._give_up(f"rank {stranded} lost the connection", exhausted(self._policy))
            return
        if not self._present.deaths or all(worker.can_take_in for worker in members):
            self._say(f"the group cannot be put together again where it failed; {Remedy.RESTART.value}")
        keeper, _ = furthest([worker for worker in members if worker.began and worker.steps >= 0])
        self._post(Restart(self._present.generation.number, keeper, ", ".join(self._present.deaths)))
        self._leave(Phase.RESTARTING, self._policy.stop_timeout, spare_state=True)

    # -- ways out ---------------------------------------------------------------------------------------------------

    def _leave(self, phase: Phase, grace: float, spare_state: bool = False) -> None:
        """Ends all workers; those with a state worth keeping have just been told, and exit by themselves."""
        self._phase = phase
        self._deadline = self._now + grace
        self._is_disbanded = self._is_disbanded or phase is Phase.RESTARTING
        for worker in self._living.values():
            if not worker.registered and worker.is_member:
                self._kill(worker, signal.SIGTERM)
            elif not (spare_state and worker.has_state):
                self._kill(worker, signal.SIGKILL)
        if phase is Phase.RESTARTING:
            self._wait_for_nodes()

    def _wait_for_nodes(self) -> None:
        if (lost := self._absences.final) is not None:
            self._give_up(lost.reason, _NOBODY_ELSE)
        else:
            self._absences.tell(Remedy.RESTART)

    def _settle_leaving(self) -> None:
        if self._living:
            if self._now >= self._deadline:
                self._kill_all()
            elif self._phase is Phase.STOPPING and not self._is_disbanded and (members := self._members()):
                # Survivors of an outage come together first, to stop behind the same step.
                self._regroup(members)
        elif self._phase is Phase.STOPPING:
            self._phase = Phase.OVER
            if self._report:
                self._say(self._report)
            self._post(Finish(self._code))
        elif not self._absences.slots and self._now >= max(self._due.values(), default=0.0):
            self._start_all()

    def _stop_asked(self, event: StopAsked) -> None:
        # A scheduler may signal all processes of a job at once: only one that asks again is impatient.
        first = self._stop_asked_at.setdefault(event.node, self._now)
        if self._phase in (Phase.RUNNING, Phase.RESTARTING):
            self._stop(event.signal)
        elif event.node >= 0 and self._now - first > _IMPATIENCE_SECONDS:
            self._kill_all()

    def _stop(self, number: int) -> None:
        self._code = 128 + number
        members = self._members()
        has_begun = bool(members) and all(worker.has_state for worker in members)
        if has_begun or self._phase is Phase.RESTARTING:
            self._post(Stop(signal_name(number)))
            self._leave(Phase.STOPPING, self._policy.stop_timeout, spare_state=True)
            return
        # They take care of it themselves, as they would without us.
        self._phase = Phase.STOPPING
        self._deadline = self._now + self._policy.stop_timeout
        for worker in self._living.values():
            self._kill(worker, number)

    def _lost(self, event: Lost) -> None:
        gone = [self._living.pop(slot) for slot in event.slots if slot in self._living]
        self._absences.begin(event)
        if any(worker.is_member for worker in gone):
            self._present.deaths.append(event.reason)
            self._break(event.reason)
        is_missed = self._phase is Phase.RUNNING and not self._finished >= set(event.slots)
        if not is_missed and self._phase is not Phase.RESTARTING:
            return
        if event.for_good:
            self._give_up(event.reason, _NOBODY_ELSE)
        elif self._is_within_budget(is_new=bool(gone) and not any(worker.is_member for worker in gone)):
            self._absences.tell(remedy_for(self._members()))
        else:
            self._give_up(event.reason, exhausted(self._policy))

    def _give_up(self, failure: str, words: str = "") -> None:
        if self._members():
            self._say(f"{failure}; stopping the others")
        self._code = 1
        self._report = f"the job failed: {failure}.\n{words}".rstrip()
        self._post(Stop(failure))
        self._leave(Phase.STOPPING, self._policy.stop_timeout, spare_state=True)

    def _kill_all(self) -> None:
        for worker in self._living.values():
            self._kill(worker, signal.SIGKILL)

    def _kill(self, worker: Worker, number: int) -> None:
        if not worker.killed:
            worker.killed = number == signal.SIGKILL
            self._post(Kill(worker.slot, worker.spawn, int(number)))
