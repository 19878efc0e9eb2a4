"""How all ranks save at the same steps without a collective.

Rank 0 decides. It writes its plan to the process group's store before it takes part in the next step's collectives, so
every rank that has finished that step can read it. A plan costs one write and one read; the steps between cost nothing.
"""

import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from lightning_scar.core.private import default_store

#: Steps without an answer after which a rank decides by itself.
_PATIENCE = 4

#: The interval it then uses if it knows no other.
_INTERVAL = 100

#: The most steps that a plan may look ahead.
_FARTHEST = 1 << 20


class Plan(NamedTuple):
    """What all ranks do after a step.

    Attributes:
        made_at: The step after which the plan was made.
        step: The step.
        save: ``"partial"``, ``"full"``, or ``""`` to make only the next plan.
        common: Whether all ranks certainly follow it.

    """

    made_at: int
    step: int
    save: str
    common: bool = True


#: Makes a plan, given the current step, how many steps it may look ahead, and whether a save begins now.
Propose = Callable[[int, int, bool], tuple[int, str]]


class Agreement:
    """This rank's view of the plans, across changes of the process group.

    When the group changes, a plan stays valid if every rank had time to read it. Rank 0 of the new group writes it, or
    a new plan, to the new store. The others look for it at every step until they find it.

    Args:
        name: A name for these plans, the same on all ranks and unique among the trainings of this group.
        step: The step after which this rank begins.

    """

    def __init__(self, name: str, step: int) -> None:
        self._key = f"lightning_scar/{name}"
        self._step = step
        self._plan: Plan | None = None
        self._previous: Plan | None = None
        #: For how many steps this rank has looked for a plan; ``None`` if it need not look.
        self._looked: int | None = 0
        self._horizon = 1
        self._saved_at = step
        self._interval = _INTERVAL
        self._store: weakref.ref[Store] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there are other ranks now."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def leave(self, step: int) -> None:
        """Drop the plan, because there are no other ranks now."""
        self._step, self._plan, self._store = step, None, None

    def due(self, step: int, propose: Propose) -> Plan | None:
        """Return what is due after a step, ``None`` for nothing.

        Args:
            step: The step that this rank has just completed.
            propose: Called on rank 0 when a new plan is needed.

        """
        store = default_store()
        before, self._step = self._step, step
        is_another = self._store is None or self._store() is not store
        if is_another:
            # A strong reference would keep the connections of a destroyed group alive.
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
            # The first estimate of the step time is poor, so it must not bind for long.
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
            # `set` does not wait for the store, `check` does: now every rank can read the plan.
            store.check([self._key])

    def _look(self, store: Store, before: int) -> None:
        assert self._looked is not None
        self._looked += 1
        with suppress(RuntimeError):
            if not store.check([self._key]):
                return
            # Rank 0 may be one step, and so one plan, ahead.
            plans = [Plan(*plan) for plan in json.loads(store.get(self._key))]
            plan = next((plan for plan in plans if plan.step > before), None)
            if plan is not None:
                self._plan, self._looked = plan, None

    def _own(self, step: int) -> Plan | None:
        """Continue with the last interval, counted from the last step at which all ranks saved."""
        is_due = step - self._saved_at >= self._interval
        return Plan(step, step, "partial", common=False) if is_due else None

    def hand_over(self) -> Any:
        """Return what :meth:`take_over` needs in a process that joins the next group."""
        return self._step, self._plan and tuple(self._plan), self._saved_at, self._interval

    def take_over(self, known: Any) -> None:
        """Continue with what another rank knew, which may not have handled the current step yet."""
        seen, told, self._saved_at, self._interval = known
        plan = Plan(*told) if told is not None else None
        self._plan = plan if plan is not None and plan.made_at < seen and plan.step > self._step else None
