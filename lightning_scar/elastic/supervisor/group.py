"""The group of the job: its present generation, how that breaks, and how the next one forms.

It has no process, no store and no clock, as the :mod:`~lightning_scar.elastic.supervisor.coordinator`, which asks it.
"""

import signal
from collections.abc import Callable

from lightning_scar.elastic.protocol.messages import Broken, Formed, Generation, Joining, Stranded, Waiting
from lightning_scar.elastic.supervisor.crew import Crew
from lightning_scar.elastic.supervisor.policy import BackOff, Budget, Policy
from lightning_scar.elastic.supervisor.roster import Present, Worker, furthest, hanging
from lightning_scar.elastic.supervisor.wording import FAILED_BY_ITSELF, distinct_failures


class Group:
    """The generations of the job, one after the other.

    Args:
        crew: The living workers.
        policy: What the user chose.
        tell_user: Called with each line that the user should read.

    """

    def __init__(self, crew: Crew, policy: Policy, tell_user: Callable[[str], None]) -> None:
        self._crew = crew
        self._policy = policy
        self._tell_user = tell_user
        self._budget = Budget(policy)
        self._back_off = BackOff()
        self._generations = 0
        #: Slots that the training goes on without, until their replacements have joined.
        self.replaced: set[int] = set()
        self.present = Present(Generation(-1, {}, 0))

    def begin(self, slots: frozenset[int]) -> None:
        """Form a generation of workers that are started next, in the order of their slots."""
        first = self._crew.spawns
        self.replaced = set()
        self._form(Generation(self._generations, {slot: first + i for i, slot in enumerate(sorted(slots))}, source=0))

    def may_restart(self, is_new: bool = False) -> bool:
        """Count a failure, unless it is one more of the present generation. Return whether it is within the budget.

        Args:
            is_new: Whether it counts in any case.

        """
        # Without a step since the generation formed, nothing was better than before.
        _, step = furthest(self._crew.members)
        forgets = bool(self.present.deaths) or is_new or step > self.present.generation.step
        return self.present.count_failure(self._budget, self._crew.now, is_new, forgets)

    def pause(self) -> float:
        """Return for how many seconds to wait until the group may form again; 0 if a member died."""
        if not self.present.failed_by_itself:
            return 0.0
        return self._back_off.pause(slot=-1, lived=self._crew.now - self.present.formed)

    # -- the end of a generation -------------------------------------------------------------------------------------

    def lose(self, death: str) -> None:
        """Note that a member died. Survivors often notice before the process is gone: they are told who it was."""
        self.present.deaths.append(death)
        self.break_up(death)

    def break_up(self, reason: str) -> None:
        """Tell everybody that the present generation has failed, unless they know."""
        if not self.present.is_broken:
            self.present.broken_at = self._crew.now
            self._crew.say(Broken(self.present.generation.number, reason))

    def leave(self, worker: Worker, event: Waiting | Stranded) -> None:
        """Note that a worker has left the present generation."""
        is_of_present = event.generation == self.present.generation.number
        if not (is_of_present and worker.is_member) or isinstance(worker.left, Stranded):
            return
        worker.left_at = self._crew.now if worker.left is None else worker.left_at
        worker.left = event
        if isinstance(event, Waiting) and event.failure:
            self.present.failures[worker.slot] = event.failure
        elif isinstance(event, Waiting):
            self.present.is_planned = True
        # Members at a step's boundary have left to take joiners in: nothing failed.
        if isinstance(event, Stranded) or event.failure or not event.boundary:
            self.break_up(f"rank {worker.slot} lost the connection")

    def wait_to_join(self, worker: Worker) -> None:
        """Note that a replacement waits to be taken in."""
        if worker.is_member:
            # It was taken in, and the generation broke before it had the state: it is a replacement once more.
            worker.is_member, worker.left = False, None
            self.replaced.add(worker.slot)
            self.break_up(f"rank {worker.slot} lost the connection")
        worker.ready = True
        self._announce_ready()

    def _announce_ready(self) -> None:
        """Tell the members which replacements wait, if they can take them in."""
        ready = tuple(worker.slot for worker in self._crew.ready)
        if ready and not self.present.is_broken:
            self._crew.say(Joining(self.present.generation.number, ready))

    # -- the next one ------------------------------------------------------------------------------------------------

    @property
    def is_stranded(self) -> bool:
        """Whether all members have left the present generation, and some cannot go on in the same process."""
        left = [worker.left for worker in self._crew.members]
        return None not in left and any(isinstance(how, Stranded) for how in left)

    def regroup(self) -> bool:
        """Form the next generation as soon as all members wait for it; kill those that they wait for too long.

        Returns:
            ``False`` if no more may form: they fail again and again, though nobody dies.

        """
        members = self._crew.members
        left = [worker.left for worker in members]
        if None in left:
            for worker in hanging(members, self._crew.now, self._policy.hang_timeout):
                worker.fault = "hung"
                self._crew.kill(worker, signal.SIGKILL)
            self._mention_silence(members)
        elif left and not self.is_stranded:
            if self.present.due is None and not self._may_form_again():
                return False
            if self.present.due is not None and self._crew.now >= self.present.due:
                self._form_next(members)
        return True

    def _mention_silence(self, members: list[Worker]) -> None:
        """Say once that survivors do something else for long. None hangs for sure where nobody waits."""
        present, patience = self.present, self._policy.hang_timeout
        is_silent = present.broken_at is not None and all(worker.left is None for worker in members)
        if is_silent and not present.is_silence_told and self._crew.now - (present.broken_at or 0.0) > patience:
            present.is_silence_told = True
            ranks = "rank " + ", ".join(str(worker.slot) for worker in members)
            self._tell_user(
                f"{', '.join(present.deaths)}; for {patience:g} s nothing was heard of {ranks}. Nobody else waits, so "
                "that may go on: a long validation, a save. If it hangs, stop the job"
            )

    def _may_form_again(self) -> bool:
        """Decide when the next generation forms. Return whether it may."""
        pause = self.pause()
        if self.present.failed_by_itself:
            if not self.may_restart():
                return False
            when = f" in {pause:g} s" if pause else ""
            [failure, *_] = distinct_failures(self.present.failures)
            self._tell_user(f"{FAILED_BY_ITSELF} ({failure}); it forms again{when}")
        self.present.due = self._crew.now + pause
        return True

    def _form_next(self, members: list[Worker]) -> None:
        source, step = furthest(members)
        places = {(worker.left.step, worker.left.boundary) for worker in members if isinstance(worker.left, Waiting)}
        joiners = self._crew.ready if places == {(step, True)} else []
        for worker in members:
            worker.left = None
        for worker in joiners:
            worker.is_member, worker.ready, worker.began = True, False, True
        spawns = {worker.slot: worker.spawn for worker in self._crew.members}
        slots = tuple(worker.slot for worker in joiners)
        self.replaced.difference_update(slots)
        self._form(Generation(self._generations, spawns, source, step, slots, ", ".join(self.present.deaths)))
        self._announce_ready()

    def _form(self, generation: Generation) -> None:
        self.present = Present(generation, formed=self._crew.now)
        self._generations = generation.number + 1
        self._crew.say(Formed(generation))
