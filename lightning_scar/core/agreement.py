"""How all ranks come to save at the same steps, without a collective.

Rank 0 decides. What it plans behind one step it writes to the process group's store before it takes part in the next
step's collectives. So whoever has finished that step can read it: one write and one read for each plan, and nothing in
the steps between.
"""

import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.core.private import default_store

#: So many steps without an answer, and a rank goes on by itself.
_PATIENCE = 4

#: What it goes on with if it knows no better.
_INTERVAL = 100

#: So many steps ahead a plan may lie.
_FARTHEST = 1 << 20


class Plan(NamedTuple):
    """What all ranks do when they come to a step.

    Attributes:
        made_at: The step behind which it was made.
        step: The step.
        save: ``"partial"``, ``"full"``, or ``""`` for nothing but the next plan.
        common: Whether it is sure that all ranks follow it.

    """

    made_at: int
    step: int
    save: str
    common: bool = True


#: Makes a plan, given the present step, how many steps it may look ahead, and whether a save begins now.
Propose = Callable[[int, int, bool], tuple[int, str]]


class Agreement:
    """This rank's part in it, through all process groups that it is in.

    When the group changes, a plan stays in force if everybody had the time to read it; the first rank of the new group
    writes it down again there, or else a new one. The others look for it at every step until they find it.

    Args:
        name: Of what they agree on, the same on all ranks and in no other training of this group.
        step: The step behind which this rank begins.

    """

    def __init__(self, name: str, step: int) -> None:
        self._key = f"lightning_scar/{name}"
        self._step = step
        self._plan: Plan | None = None
        self._previous: Plan | None = None
        #: The steps for which this rank has looked for a plan; ``None`` if it need not look.
        self._looked: int | None = 0
        self._horizon = 1
        self._saved_at = step
        self._interval = _INTERVAL
        self._store: weakref.ref[Store] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there are other ranks at the moment."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def leave(self, step: int) -> None:
        """There is nobody else at the moment: no plan binds this rank any more."""
        self._step, self._plan, self._store = step, None, None

    def due(self, step: int, propose: Propose) -> Plan | None:
        """What is due behind a step; ``None`` for nothing.

        Args:
            step: The step that this rank has just completed.
            propose: Called on rank 0 when there must be another plan.

        """
        store = default_store()
        before, self._step = self._step, step
        is_another = self._store is None or self._store() is not store
        if is_another:
            # A reference would keep a group's connections alive beyond its end.
            self._store = weakref.ref(store)
            self._looked = 0
            if self._plan is not None:
                self._plan = self._plan._replace(common=False) if self._plan.made_at < before else None
        leads = dist.get_rank() == 0
        if not leads and self._looked is not None:
            self._look(store, before)
        due = self._plan if self._plan is not None and step >= self._plan.step else None
        if leads:
            self._lead(store, step, due, propose, is_another)
        elif due is not None:
            self._plan, self._looked = None, 0
        elif self._plan is None and self._looked is not None and self._looked >= _PATIENCE:
            due = self._own(step)
        if due is None or not due.save:
            return None
        if due.common:
            self._interval = step - self._saved_at
        self._saved_at = step
        return due

    def _lead(self, store: Store, step: int, due: Plan | None, propose: Propose, is_another: bool) -> None:
        plan = self._plan
        if plan is None or due is not None:
            # A first estimate of what steps take is a bad one: it must not bind for long.
            self._horizon = 1 if is_another else min(2 * self._horizon, _FARTHEST)
            self._previous, self._plan = plan, Plan(step, *propose(step, self._horizon, bool(due and due.save)))
        elif is_another:
            self._previous = None
        else:
            return
        self._looked = None
        known = [list(plan) for plan in (self._previous, self._plan) if plan is not None]
        with suppress(RuntimeError):
            store.set(self._key, json.dumps(known))
            # The store answers what it is asked, not what it is told: now everybody can read it.
            store.check([self._key])

    def _look(self, store: Store, before: int) -> None:
        assert self._looked is not None
        self._looked += 1
        with suppress(RuntimeError):
            if not store.check([self._key]):
                return
            # Rank 0 may be a step ahead, and a plan further.
            plans = [Plan(*plan) for plan in json.loads(store.get(self._key))]
            plan = next((plan for plan in plans if plan.step > before), None)
            if plan is not None:
                self._plan, self._looked = plan, None

    def _own(self, step: int) -> Plan | None:
        """Nobody can be asked: the last interval goes on, from the last step at which all saved."""
        is_due = step - self._saved_at >= self._interval
        return Plan(step, step, "partial", common=False) if is_due else None

    def hand_over(self) -> Any:
        """For :meth:`take_over` in another process that comes into the next group."""
        return self._step, self._plan and tuple(self._plan), self._saved_at, self._interval

    def take_over(self, known: Any) -> None:
        """Goes on with what another rank knew, who may have still to see to the present step."""
        seen, told, self._saved_at, self._interval = known
        plan = Plan(*told) if told is not None else None
        self._plan = plan if plan is not None and plan.made_at < seen and plan.step > self._step else None
