"""Decides what happens when workers start, fail, wait and exit. It has no process, no store and no clock.

The rules, in the order of an outage:

1. A worker dies (:class:`Exited`), or one says that its group failed (:class:`Waiting`, :class:`Stranded`). The
   generation is broken, and everybody is told (:class:`Broken`).
2. If all survivors are in a training, the dead one's slot is filled again (:class:`Spawn`) while they go on. If one is
   still in its start-up, or does not speak the protocol, nothing can be kept: all are ended and started again.
3. Survivors that wait form the next generation (:class:`Formed`) as soon as all are there. One for which the others
   have waited too long hangs, and is killed. If one is stranded, one worker saves the state and all start again
   (:class:`Restart`). A generation that fails though nobody died is a failure, too.
4. A replacement that is :class:`Ready` is announced (:class:`Joining`). The members agree on a step, and leave their
   generation after it. The next generation takes the replacement in. One that is not ready in time is killed.

5. A slot whose replacements die on their way in moves to a node where a spare waits (:class:`SparesWaiting`).

When a node is :class:`Lost` all its workers died, and their slots stay empty until it is :class:`Back`.
Failures beyond ``max_restarts`` and signals end the job: workers with something to save are told to (:class:`Stop`).
"""

import signal
from collections.abc import Callable, Iterable
from dataclasses import replace

from lightning_scar.elastic.protocol.messages import (
    Back,
    Began,
    Change,
    Ended,
    Event,
    Exited,
    Finish,
    GaveUp,
    Lost,
    Notice,
    Ready,
    Registered,
    Restart,
    SparesWaiting,
    Stepped,
    Stop,
    StopAsked,
    Stranded,
    Waiting,
    WorkerEvent,
)
from lightning_scar.elastic.supervisor.crew import Crew
from lightning_scar.elastic.supervisor.group import Group
from lightning_scar.elastic.supervisor.homes import Homes
from lightning_scar.elastic.supervisor.policy import BackOff, Policy
from lightning_scar.elastic.supervisor.roster import LostNodes, Phase, Remedy, Worker, furthest, remedy_for
from lightning_scar.elastic.supervisor.wording import (
    FAILED_BY_ITSELF,
    describe_exit,
    describe_stderr,
    no_group,
    out_of_restarts,
    signal_name,
)

_NOBODY_ELSE = "Nobody else can fill its slots. Start the job again when the node is back.\n"
#: Seconds that a replacement has at least to get ready.
_LEAST_PATIENCE = 60.0
#: Signals within this time are one request to stop.
_ONE_REQUEST_SECONDS = 1.0


class Coordinator:
    """The one place where decisions are made. Events go in, with the time; notices come out.

    Args:
        world_size: How many slots there are.
        policy: What the user chose.
        tell_user: Called with each line that the user should read.
        per_node: How many slots each node has; all by default.

    """

    def __init__(
        self, world_size: int, policy: Policy, tell_user: Callable[[str], None], per_node: int | None = None
    ) -> None:
        self._slots = frozenset(range(world_size))
        self._policy = policy
        self._tell_user = tell_user
        self._homes = Homes(per_node or world_size)
        self._crew = Crew(self._homes)
        self._group = Group(self._crew, policy, tell_user)
        self._back_off = BackOff()
        self._lost_nodes = LostNodes()
        self._phase = Phase.OVER
        self._attempt = -1
        self._code = 0
        self._report = ""
        #: How long the slowest worker took from its start to its first step; 0 if unknown.
        self._slowest_start = 0.0
        #: When each node's agent first got a signal to stop.
        self._stop_asked_at: dict[int, float] = {}
        #: When workers that should exit are killed.
        self._deadline = float("inf")

    def start(self, now: float) -> list[Notice]:
        """Start the job."""
        self._crew.now = now
        self._start_all()
        return self._crew.drain_notices()

    def handle(self, event: Event | Change, now: float) -> list[Notice]:
        """Decide what follows from an event."""
        self._crew.now = now
        match event:
            case Lost():
                self._on_lost(event)
            case Back():
                # A user who was never told that it was lost need not know.
                if self._lost_nodes.end(event.node):
                    self._tell_user(f"node {event.node} is back")
            case StopAsked(slot=-1):
                self._on_stop_asked(event)
            case SparesWaiting():
                self._homes.note_spares(event.node, event.count)
            case _:
                worker = self._crew.get(event.slot)
                if worker is not None and worker.spawn == event.spawn:
                    self._on_worker_event(worker, event)
        self._settle()
        return self._crew.drain_notices()

    def tick(self, now: float) -> list[Notice]:
        """Decide what is due by now."""
        self._crew.now = now
        self._settle()
        return self._crew.drain_notices()

    # -- the start of all workers -----------------------------------------------------------------------------------

    def _start_all(self) -> None:
        self._phase = Phase.RUNNING
        self._attempt += 1
        #: Slots whose worker exited with code 0.
        self._finished: set[int] = set()
        #: Whether a worker has begun a training.
        self._has_begun = False
        #: When a slot may be filled again, if its node is there.
        self._due: dict[int, float] = {}
        #: Whether workers were told to exit for a restart: they form no more groups, not even to stop.
        self._is_disbanded = False
        self._group.begin(self._slots)
        for slot in sorted(self._slots):
            self._crew.spawn(slot, self._group.present.generation.number, self._attempt)

    # -- events of workers -------------------------------------------------------------------------------------------

    def _on_worker_event(self, worker: Worker, event: WorkerEvent) -> None:
        match event:
            case Registered():
                worker.registered = True
            case Began():
                worker.began, worker.ended, worker.can_take_in = True, False, event.can_take_in
                self._has_begun = True
            case Stepped() if not worker.is_replacement:
                self._slowest_start = max(self._slowest_start, self._crew.now - worker.born)
            case Ended():
                worker.ended = True
                self._pass_on([worker])
            case Ready():
                self._homes.succeed(worker.slot)
                self._group.wait_to_join(worker)
            case Waiting() | Stranded():
                self._group.leave(worker, event)
            case GaveUp() if self._phase is Phase.RUNNING:
                self._give_up(event.reason)
            case Exited():
                self._on_exit(worker, event)
            case StopAsked():
                self._on_stop_asked(event)
            case _:
                pass

    def _on_exit(self, worker: Worker, event: Exited) -> None:
        del self._crew[worker.slot]
        how = f"{worker.fault} and was killed" if worker.fault else describe_exit(event.code)
        if event.code == 0 and (worker.ended or not worker.began):
            self._finished.add(worker.slot)
            return
        if worker.is_member:
            self._group.lose(f"rank {worker.slot} {how}")
        if self._phase is Phase.RUNNING:
            self._on_death(worker, event, how)

    def _on_death(self, worker: Worker, event: Exited, how: str) -> None:
        self._due[worker.slot] = self._crew.now + self._back_off.pause(worker.slot, self._crew.now - worker.born)
        failure, words = f"rank {worker.slot} {how}", describe_stderr(worker.slot, event.code, event.tail)
        if worker.is_at_fault(event.code, is_first_start=self._attempt == 0):
            self._give_up(failure, words)
        # A replacement that has not joined is in no generation: its death always counts.
        elif self._group.may_restart(is_new=not worker.is_member):
            self._tell_user(f"{failure}; {self._remedy_for(worker)}")
        else:
            self._give_up(failure, words + out_of_restarts(self._policy))

    def _remedy_for(self, worker: Worker) -> str:
        """Return in words what becomes of the slot of a worker that died."""
        is_on_its_way = worker.is_replacement and not worker.is_member and not worker.ready
        node = self._homes.fail(worker.slot) if is_on_its_way else None
        if node is None:
            return remedy_for(self._crew.members).value
        self._due[worker.slot] = self._crew.now
        return f"a spare of node {node} takes its place, since it cannot start on its own node"

    # -- decisions -------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        if self._phase is Phase.RUNNING:
            self._settle_running()
        if self._phase in (Phase.RESTARTING, Phase.STOPPING):
            self._settle_leaving()

    def _settle_running(self) -> None:
        members, replaced = self._crew.members, self._group.replaced
        unfinished = self._slots - self._finished
        missing = unfinished - self._crew.keys()
        remedy = remedy_for(members)
        if not members and (not unfinished or (self._finished and unfinished <= replaced)):
            # The training ended, perhaps without its replacements: they have nothing to join.
            self._leave(Phase.STOPPING, grace=0)
        elif not members or (missing and remedy is Remedy.RESTART):
            if not members and self._has_begun:
                self._tell_user("nobody is left who has the state; the last save counts, if there is one")
            self._leave(Phase.RESTARTING, grace=self._policy.kill_grace)
        else:
            if remedy in (Remedy.REPLACEMENT, Remedy.RESTART_OF_SHARDS):
                replaced |= missing
            if remedy is Remedy.REPLACEMENT:
                self._fill(missing)
            self._kill_late()
            if self._group.is_stranded:
                self._restart_stranded(members)
            elif not self._group.regroup():
                self._give_up(FAILED_BY_ITSELF, no_group(self._group.present.failures, self._policy), disbands=True)

    def _fill(self, missing: frozenset[int]) -> None:
        for slot in sorted(missing - self._lost_nodes.slots):
            if self._crew.now >= self._due.get(slot, 0.0):
                self._crew.spawn(slot, generation=-1, attempt=self._attempt)

    def _kill_late(self) -> None:
        """Kill replacements that hang on their way in. The members are as they were."""
        patience = max(_LEAST_PATIENCE, 2 * self._slowest_start)
        for worker in self._crew.values():
            is_on_its_way = not (worker.is_member or worker.ready or worker.killed)
            if is_on_its_way and self._slowest_start and self._crew.now - worker.born > patience:
                took = f"the first start took {self._slowest_start:.0f} s"
                worker.fault = f"was not ready within {patience:.0f} s ({took})"
                self._crew.kill(worker, signal.SIGKILL)

    def _restart_stranded(self, members: list[Worker]) -> None:
        present = self._group.present
        stranded = next(worker.slot for worker in members if isinstance(worker.left, Stranded))
        if not self._group.may_restart():
            self._give_up(f"rank {stranded} lost the connection", out_of_restarts(self._policy))
            return
        if not present.deaths or all(worker.can_take_in for worker in members):
            self._tell_user(f"the group cannot be put together again where it failed; {Remedy.RESTART.value}")
        keeper, _ = furthest([worker for worker in members if worker.began and worker.steps >= 0])
        if keeper < 0 and any(worker.began for worker in members):
            self._tell_user("nobody has a whole state, since an update was cut short; the last save counts")
        self._crew.say(Restart(present.generation.number, keeper, ", ".join(present.deaths)))
        self._due[-1] = self._crew.now + self._group.pause()
        self._leave(Phase.RESTARTING, self._policy.stop_timeout, spare_state=True)

    # -- ways out ---------------------------------------------------------------------------------------------------

    def _leave(self, phase: Phase, grace: float, spare_state: bool = False) -> None:
        """End all workers. With ``spare_state`` those that have a state were just told, and exit by themselves."""
        self._phase = phase
        self._deadline = self._crew.now + grace
        self._is_disbanded = self._is_disbanded or phase is Phase.RESTARTING
        for worker in self._crew.values():
            if not worker.registered and worker.is_member:
                self._crew.kill(worker, signal.SIGTERM)
            elif not (spare_state and worker.has_state):
                self._crew.kill(worker, signal.SIGKILL)
        if phase is Phase.RESTARTING:
            self._wait_for_nodes()

    def _wait_for_nodes(self) -> None:
        if (lost := self._lost_nodes.for_good) is not None:
            self._give_up(lost.reason, _NOBODY_ELSE)
            return
        for line in self._lost_nodes.news(Remedy.RESTART, self._policy.node_timeout):
            self._tell_user(line)

    def _settle_leaving(self) -> None:
        if self._crew:
            if self._crew.now >= self._deadline:
                self._crew.kill_all()
            # Survivors of an outage come together first, to stop after the same step; those that are stranded exit.
            elif self._phase is Phase.STOPPING and not self._is_disbanded and not self._group.regroup():
                self._disband(FAILED_BY_ITSELF)
        elif self._phase is Phase.STOPPING:
            self._phase = Phase.OVER
            if self._report:
                self._tell_user(self._report)
            self._crew.say(Finish(self._code))
        elif not self._lost_nodes and self._crew.now >= max(self._due.values(), default=0.0):
            self._start_all()

    def _on_stop_asked(self, event: StopAsked) -> None:
        # A scheduler may signal all processes of a job at once, and twice. Only Ctrl-C that is pressed again kills.
        first = self._stop_asked_at.setdefault(event.node, self._crew.now)
        if self._phase in (Phase.RUNNING, Phase.RESTARTING):
            self._stop(event.signal)
        elif event.signal == signal.SIGINT and event.node >= 0 and self._crew.now - first > _ONE_REQUEST_SECONDS:
            self._crew.kill_all()

    def _stop(self, number: int) -> None:
        self._code = 128 + number
        members = self._crew.members
        has_begun = bool(members) and all(worker.has_state for worker in members)
        self._crew.say(Stop(signal_name(number)))
        if has_begun or self._phase is Phase.RESTARTING:
            self._leave(Phase.STOPPING, self._policy.stop_timeout, spare_state=True)
            self._pass_on([worker for worker in members if worker.ended])
            return
        # Without a common state each takes the signal as it would without a supervisor.
        self._phase = Phase.STOPPING
        self._deadline = self._crew.now + self._policy.stop_timeout
        self._pass_on(self._crew.values())

    def _pass_on(self, workers: Iterable[Worker]) -> None:
        """Let workers that stop after no common step take the signal that ends the job, if one does."""
        for worker in workers:
            if self._phase is Phase.STOPPING and self._code > 128:
                self._crew.kill(worker, self._code - 128)

    def _on_lost(self, event: Lost) -> None:
        slots = self._homes.lose(event.node, event.slots)
        gone = [self._crew.pop(slot) for slot in sorted(slots) if slot in self._crew]
        self._lost_nodes[event.node] = replace(event, slots=tuple(sorted(slots & set(event.slots))))
        if any(worker.is_member for worker in gone):
            self._group.lose(event.reason)
        is_missed = self._phase is Phase.RUNNING and not self._finished >= slots
        if not is_missed and self._phase is not Phase.RESTARTING:
            return
        if event.for_good:
            self._give_up(event.reason, _NOBODY_ELSE)
        elif self._group.may_restart(is_new=bool(gone) and not any(worker.is_member for worker in gone)):
            for line in self._lost_nodes.news(remedy_for(self._crew.members), self._policy.node_timeout):
                self._tell_user(line)
        else:
            self._give_up(event.reason, out_of_restarts(self._policy))

    def _disband(self, reason: str) -> None:
        self._is_disbanded = True
        self._crew.say(Stop(reason, disbands=True))

    def _give_up(self, failure: str, words: str = "", disbands: bool = False) -> None:
        if self._crew.members:
            self._tell_user(f"{failure}; stopping the others")
        self._code = 1
        self._report = f"the job failed: {failure}.\n{words}".rstrip()
        self._disband(failure) if disbands else self._crew.say(Stop(failure))
        self._leave(Phase.STOPPING, self._policy.stop_timeout, spare_state=True)
