"""Decides what happens when workers start, fail, wait and exit. It has no process, no store and no clock.

The rules, in the order of an outage:

1. A worker dies (:class:`Exited`), or one says that its group failed (:class:`Waiting`, :class:`Stranded`). The
   generation is broken, and everybody is told (:class:`Broken`).
2. If all survivors are in a training, the dead one's slot is filled again (:class:`Spawn`) while they go on. If one is
   still in its start-up, or does not speak the protocol, nothing can be kept: all are ended and started again.
3. Survivors that wait form the next generation (:class:`Formed`) as soon as all are there. One for which the others
   have waited too long hangs, and is killed. If one is stranded, one worker saves the state and all start again
   (:class:`Restart`).
4. A replacement that is :class:`Ready` is announced (:class:`Joining`). The members agree on a step, and leave their
   generation after it. The next generation takes the replacement in.

When a node is :class:`Lost` all its workers died, and their slots stay empty until it is :class:`Back`.
Failures beyond ``max_restarts`` and signals end the job: workers with something to save are told to (:class:`Stop`).
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
from lightning_scar.elastic.supervisor.policy import BackOff, Budget, Policy
from lightning_scar.elastic.supervisor.roster import LostNodes, Phase, Present, Remedy, Worker, furthest, remedy_for
from lightning_scar.elastic.supervisor.wording import describe_exit, describe_stderr, out_of_restarts, signal_name

_NOBODY_ELSE = "Nobody else can fill its slots. Start the job again when the node is back.\n"
#: Signals within this time are one request to stop.
_ONE_REQUEST_SECONDS = 1.0


class Coordinator:
    """The one place where decisions are made. Events go in, with the time; notices come out.

    Args:
        world_size: How many slots there are.
        policy: What the user chose.
        tell_user: Called with each line that the user should read.

    """

    def __init__(self, world_size: int, policy: Policy, tell_user: Callable[[str], None]) -> None:
        self._slots = frozenset(range(world_size))
        self._policy = policy
        self._tell_user = tell_user
        self._budget = Budget(policy)
        self._back_off = BackOff()
        self._lost_nodes = LostNodes()
        self._notices: list[Notice] = []
        self._phase = Phase.OVER
        self._now = 0.0
        self._attempt = -1
        self._spawns = 0
        self._generations = 0
        self._living: dict[int, Worker] = {}
        self._code = 0
        self._report = ""
        #: When each node's agent first got a signal to stop.
        self._stop_asked_at: dict[int, float] = {}
        #: When workers that should exit are killed.
        self._deadline = float("inf")

    def start(self, now: float) -> list[Notice]:
        """Start the job."""
        self._now = now
        self._start_all()
        return self._drain_notices()

    def handle(self, event: Event | Change, now: float) -> list[Notice]:
        """Decide what follows from an event."""
        self._now = now
        match event:
            case Lost():
                self._on_lost(event)
            case Back():
                # A user who was never told that it was lost need not know.
                if self._lost_nodes.end(event.node):
                    self._tell_user(f"node {event.node} is back")
            case StopAsked(slot=-1):
                self._on_stop_asked(event)
            case _:
                worker = self._living.get(event.slot)
                if worker is not None and worker.spawn == event.spawn:
                    self._on_worker_event(worker, event)
        self._settle()
        return self._drain_notices()

    def tick(self, now: float) -> list[Notice]:
        """Decide what is due by now."""
        self._now = now
        self._settle()
        return self._drain_notices()

    def _drain_notices(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        return notices

    # -- the start of all workers -----------------------------------------------------------------------------------

    def _start_all(self) -> None:
        self._phase = Phase.RUNNING
        self._attempt += 1
        #: Slots whose worker exited with code 0.
        self._finished: set[int] = set()
        #: Slots that the training goes on without, until their replacements have joined.
        self._replaced: set[int] = set()
        #: When a slot may be filled again, if its node is there.
        self._due: dict[int, float] = {}
        #: Whether workers were told to exit for a restart: they form no more groups, not even to stop.
        self._is_disbanded = False
        first = self._spawns
        self._form(Generation(self._generations, {slot: first + slot for slot in sorted(self._slots)}, source=0))
        for slot in sorted(self._slots):
            self._spawn(slot, self._present.generation.number)

    def _spawn(self, slot: int, generation: int) -> None:
        self._living[slot] = Worker(slot, self._spawns, self._now, is_member=generation >= 0)
        self._notices.append(Spawn(slot, self._spawns, generation, self._attempt))
        self._spawns += 1

    def _form(self, generation: Generation) -> None:
        self._present = Present(generation)
        self._generations = generation.number + 1
        self._notices.append(Formed(generation))

    # -- events of workers -------------------------------------------------------------------------------------------

    def _on_worker_event(self, worker: Worker, event: Event) -> None:
        match event:
            case Registered():
                worker.registered = True
            case Began():
                worker.began, worker.ended, worker.can_take_in = True, False, event.can_take_in
            case Ended():
                worker.ended = True
            case Ready():
                self._on_ready(worker)
            case Waiting() | Stranded():
                self._on_leaving(worker, event)
            case GaveUp() if self._phase is Phase.RUNNING:
                self._give_up(event.reason)
            case Exited():
                self._on_exit(worker, event)
            case StopAsked():
                self._on_stop_asked(event)
            case _:
                pass

    def _on_ready(self, worker: Worker) -> None:
        if worker.is_member:
            # It was taken in, and the generation broke before it had the state: it is a replacement once more.
            worker.is_member, worker.left = False, None
            self._replaced.add(worker.slot)
            self._break(f"rank {worker.slot} lost the connection")
        worker.ready = True
        self._announce_ready()

    def _on_leaving(self, worker: Worker, event: Waiting | Stranded) -> None:
        is_of_present = event.generation == self._present.generation.number
        if not (is_of_present and worker.is_member) or isinstance(worker.left, Stranded):
            return
        worker.left = event
        if self._present.leaving_since is None:
            self._present.leaving_since = self._now
        # Members at a step's boundary have left to take joiners in: nothing failed.
        if isinstance(event, Stranded) or not event.boundary:
            self._break(f"rank {worker.slot} lost the connection")

    def _on_exit(self, worker: Worker, event: Exited) -> None:
        del self._living[worker.slot]
        how = "hung and was killed" if worker.hung else describe_exit(event.code)
        if event.code == 0 and (worker.ended or not worker.began):
            self._finished.add(worker.slot)
            return
        if worker.is_member:
            # Survivors often notice before the process is gone. They are told who it was all the same.
            self._present.deaths.append(f"rank {worker.slot} {how}")
            self._break(self._present.deaths[-1])
        if self._phase is Phase.RUNNING:
            self._on_death(worker, event, how)

    def _on_death(self, worker: Worker, event: Exited, how: str) -> None:
        self._due[worker.slot] = self._now + self._back_off.pause(worker.slot, self._now - worker.born)
        failure, words = f"rank {worker.slot} {how}", describe_stderr(worker.slot, event.code, event.tail)
        if worker.is_at_fault(event.code, is_first_start=self._attempt == 0):
            self._give_up(failure, words)
        # A replacement that has not joined is in no generation: its death always counts.
        elif self._may_restart(is_new=not worker.is_member):
            self._tell_user(f"{failure}; {remedy_for(self._members()).value}")
        else:
            self._give_up(failure, words + out_of_restarts(self._policy))

    def _may_restart(self, is_new: bool) -> bool:
        return self._present.count_failure(self._budget, self._now, is_new)

    def _break(self, reason: str) -> None:
        if not self._present.is_broken:
            self._present.is_broken, self._present.leaving_since = True, self._now
            self._notices.append(Broken(self._present.generation.number, reason))

    # -- decisions -------------------------------------------------------------------------------------------------

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
            # The training ended, perhaps without its replacements: they have nothing to join.
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
        for slot in sorted(missing - self._lost_nodes.slots):
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
            self._notices.append(Joining(self._present.generation.number, ready))

    def _kill_hanging(self, members: list[Worker]) -> None:
        for worker in self._present.hanging(members, self._now, self._policy.hang_timeout):
            worker.hung = True
            self._kill(worker, signal.SIGKILL)

    def _restart_stranded(self, members: list[Worker]) -> None:
        if self._phase is Phase.STOPPING:
            # They were told, and exit. The others come together when they are gone.
            return
        stranded = next(worker.slot for worker in members if isinstance(worker.left, Stranded))
        if not self._may_restart(is_new=False):
            self._give_up(f"rank {stranded} lost the connection", out_of_restarts(self._policy))
            return
        if not self._present.deaths or all(worker.can_take_in for worker in members):
            self._tell_user(f"the group cannot be put together again where it failed; {Remedy.RESTART.value}")
        keeper, _ = furthest([worker for worker in members if worker.began and worker.steps >= 0])
        self._notices.append(Restart(self._present.generation.number, keeper, ", ".join(self._present.deaths)))
        self._leave(Phase.RESTARTING, self._policy.stop_timeout, spare_state=True)

    # -- ways out ---------------------------------------------------------------------------------------------------

    def _leave(self, phase: Phase, grace: float, spare_state: bool = False) -> None:
        """End all workers. With ``spare_state`` those that have a state were just told, and exit by themselves."""
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
        if (lost := self._lost_nodes.for_good) is not None:
            self._give_up(lost.reason, _NOBODY_ELSE)
            return
        for line in self._lost_nodes.news(Remedy.RESTART, self._policy.node_timeout):
            self._tell_user(line)

    def _settle_leaving(self) -> None:
        if self._living:
            if self._now >= self._deadline:
                self._kill_all()
            elif self._phase is Phase.STOPPING and not self._is_disbanded and (members := self._members()):
                # Survivors of an outage come together first, to stop after the same step.
                self._regroup(members)
        elif self._phase is Phase.STOPPING:
            self._phase = Phase.OVER
            if self._report:
                self._tell_user(self._report)
            self._notices.append(Finish(self._code))
        elif not self._lost_nodes and self._now >= max(self._due.values(), default=0.0):
            self._start_all()

    def _on_stop_asked(self, event: StopAsked) -> None:
        # A scheduler may signal all processes of a job at once, and twice. Only Ctrl-C that is pressed again kills.
        first = self._stop_asked_at.setdefault(event.node, self._now)
        if self._phase in (Phase.RUNNING, Phase.RESTARTING):
            self._stop(event.signal)
        elif event.signal == signal.SIGINT and event.node >= 0 and self._now - first > _ONE_REQUEST_SECONDS:
            self._kill_all()

    def _stop(self, number: int) -> None:
        self._code = 128 + number
        members = self._members()
        has_begun = bool(members) and all(worker.has_state for worker in members)
        self._notices.append(Stop(signal_name(number)))
        if has_begun or self._phase is Phase.RESTARTING:
            self._leave(Phase.STOPPING, self._policy.stop_timeout, spare_state=True)
            return
        # Without a common state each takes the signal as it would without a supervisor.
        self._phase = Phase.STOPPING
        self._deadline = self._now + self._policy.stop_timeout
        for worker in self._living.values():
            self._kill(worker, number)

    def _on_lost(self, event: Lost) -> None:
        gone = [self._living.pop(slot) for slot in event.slots if slot in self._living]
        self._lost_nodes[event.node] = event
        if any(worker.is_member for worker in gone):
            self._present.deaths.append(event.reason)
            self._break(event.reason)
        is_missed = self._phase is Phase.RUNNING and not self._finished >= set(event.slots)
        if not is_missed and self._phase is not Phase.RESTARTING:
            return
        if event.for_good:
            self._give_up(event.reason, _NOBODY_ELSE)
        elif self._may_restart(is_new=bool(gone) and not any(worker.is_member for worker in gone)):
            for line in self._lost_nodes.news(remedy_for(self._members()), self._policy.node_timeout):
                self._tell_user(line)
        else:
            self._give_up(event.reason, out_of_restarts(self._policy))

    def _give_up(self, failure: str, words: str = "") -> None:
        if self._members():
            self._tell_user(f"{failure}; stopping the others")
        self._code = 1
        self._report = f"the job failed: {failure}.\n{words}".rstrip()
        self._notices.append(Stop(failure))
        self._leave(Phase.STOPPING, self._policy.stop_timeout, spare_state=True)

    def _kill_all(self) -> None:
        for worker in self._living.values():
            self._kill(worker, signal.SIGKILL)

    def _kill(self, worker: Worker, number: int) -> None:
        if not worker.killed:
            worker.killed = number == signal.SIGKILL
            self._notices.append(Kill(worker.slot, worker.spawn, int(number)))
