"""The place of a ``fit`` in its training data, and the private API of Lightning's loops that it uses.

Lightning resumes the middle of an epoch with loaders that begin anew, unless they have a ``state_dict``. This module
places every loader of a dataset with indices where an undisturbed run would be. Of the others it saves the state before
the first batch that is not done, although Lightning may have fetched that batch already.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_scar.core.data_order import NO_STATE, EpochOrder, OwnGenerators, is_indexed
from lightning_scar.core.shared_epoch import RestOfEpoch, not_shared_out, recipe
from lightning_scar.lightning.private_loops import ORDERS
from lightning_scar.lightning.rank_batches import CombinedRankBatches

#: Lightning fetches at most one batch ahead.
_KEPT_STATES = 3


class TrainingData:
    """Follows the loaders of a ``fit``, and places them when it resumes.

    It replaces methods of Lightning's loops, until :meth:`remove`.

    Args:
        trainer: The trainer, before it restores its loops.

    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        loop = self._loop = trainer.fit_loop
        self._orders: list[OwnGenerators] = []
        self._saved: dict[str, Any] = {}
        #: The states of loaders that have one, by the number of batches fetched before.
        self._states: dict[int, list[Any]] = {}
        #: Whether the run resumed at the end of an epoch, so that the next one has not begun.
        self._begins_next = False
        self._is_loaded = False
        #: For each loader, the number of batches to load and discard.
        self._discards: list[int] = []
        #: The rest of an epoch that these ranks have shared out, and the epoch.
        self._shared: dict[str, Any] = {}
        self._others: CombinedRankBatches | None = None
        loop.__dict__.update(
            on_save_checkpoint=self._save,
            on_load_checkpoint=self._load,
            _load_combined_loader_states=self._set_up,
        )
        loop.epoch_loop.__dict__.update(
            reset=self._reset, on_run_start=self._begin_epoch, _on_before_fetch=self._before_fetch
        )

    @classmethod
    def of(cls, trainer: pl.Trainer) -> "TrainingData":
        """Return what follows the trainer's loaders; the first call makes it."""
        present = getattr(trainer.fit_loop.on_save_checkpoint, "__self__", None)
        return present if isinstance(present, cls) else cls(trainer)

    def remove(self) -> None:
        """Give loaders and loops back as they were."""
        self._unfollow()
        for loop in (self._loop, self._loop.epoch_loop):
            for name, value in list(vars(loop).items()):
                if getattr(value, "__self__", None) is self:
                    delattr(loop, name)

    def _follow(self) -> None:
        self._unfollow()
        self._orders = [
            OwnGenerators(loader, _sampler(loader))
            if not is_indexed(loader) or _knows_place(loader)
            else EpochOrder(loader)
            for loader in self._loaders
        ]
        self._load_others()

    def _unfollow(self) -> None:
        self.release_batches()
        for order in self._orders:
            order.remove()
        self._orders = []

    # -- saves -------------------------------------------------------------------------------------------------

    def _save(self) -> dict[str, Any]:
        loop = self._loop
        state: dict[str, Any] = type(loop).on_save_checkpoint(loop)
        if "combined_loader" in state:
            state["combined_loader"] = self._states.get(self._batches.processed, state["combined_loader"])
        shared = self._shared if self._shared.get("epoch") == self._epochs.started else None
        loaders = [
            {**order.state(), "recipe": recipe(_sampler(order.loader)), "shared": shared} for order in self._orders
        ]
        state[ORDERS] = {"ranks": self._trainer.world_size, "loaders": loaders}
        return state

    def _before_fetch(self) -> None:
        loop, fetcher = self._loop.epoch_loop, self._loop._data_fetcher
        assert fetcher is not None
        if states := self._combined._state_dicts():
            self._states[fetcher.fetched] = states
            while len(self._states) > _KEPT_STATES:
                del self._states[next(iter(self._states))]
        type(loop)._on_before_fetch(loop)

    # -- a resume ----------------------------------------------------------------------------------------------

    def _load(self, state: dict[str, Any]) -> None:
        self._saved = state.get(ORDERS, {})
        self._is_loaded = True
        type(self._loop).on_load_checkpoint(self._loop, state)

    def _set_up(self) -> None:
        """Follow the loaders, and place them before Lightning begins to iterate."""
        loop = self._loop
        self._follow()
        self._discards = [0] * len(self._orders)
        # Behind a closed epoch, as at the end of a run, Lightning does not call it a restart.
        if loop.restarting or self._is_loaded:
            self._resume()
        self._is_loaded = False
        for order in self._orders:
            order.begin(order.before())
        if not any(map(_knows_place, self._loaders)):
            loop._combined_loader_states_to_load = []
        type(loop)._load_combined_loader_states(loop)

    def _resume(self) -> None:
        done = self._batches.processed
        # An exception in the last batch is saved before the epoch is over.
        self._begins_next = self._loop.epoch_loop.batch_progress.is_last_batch and done == self._batches.ready
        epoch = self._epochs.started if self._begins_next else max(self._epochs.started - 1, 0)
        for loader in self._loaders:
            _set_sampler_epoch(loader, epoch)
        before = self._saved.get("ranks", self._trainer.world_size)
        if before != self._trainer.world_size or (not self._begins_next and self._is_divided_anew()):
            self._share_out(done, before)
        elif not self._begins_next:
            self._place(done)

    def _place(self, done: int) -> None:
        """Let the next iterators begin behind the batches that are done."""
        for i, (loader, order) in enumerate(zip(self._loaders, self._orders, strict=True)):
            order.begin_at(self._state_of(i), self._position(loader, done))
            if done and not isinstance(order, EpochOrder) and not _knows_place(loader):
                rank_zero_warn(
                    f"lightning-scar: {type(loader).__name__} has neither indices nor a state, so the interrupted "
                    "epoch begins anew: samples will be repeated. Use a loader with `state_dict` and "
                    "`load_state_dict`, such as torchdata's StatefulDataLoader."
                )

    def _prepare_next(self) -> None:
        """Let the next iterators begin the epoch after the one that was saved."""
        for i, order in enumerate(self._orders):
            order.begin_next(self._state_of(i))

    def _state_of(self, i: int) -> dict[str, Any]:
        states: list[Any] = self._saved.get("loaders", [])
        state = states[i] if len(states) == len(self._orders) else None
        return state or NO_STATE

    def _position(self, loader: Any, done: int) -> int:
        """Return the number of batches that a loader has given since its iterator began."""
        length = sized_len(loader)
        if self._combined._mode != "max_size_cycle" or not done or not length:
            return done
        # A shorter loader begins anew when its next batch is asked for.
        return (done - 1) % length + 1

    # -- another number of ranks -------------------------------------------------------------------------------

    def _share_out(self, done: int, before: int) -> None:
        """Share out the rest of an epoch that another number of ranks has begun.

        Args:
            done: The number of batches that each of them had done.
            before: Their number.

        """
        now = self._trainer.world_size
        self._loop._combined_loader_states_to_load = []
        total, sampler = self._total(), _sampler(self._loaders[0])
        if self._begins_next:
            self._set_done((done + 1) * before if total is None else total)
        elif before == now and (shared := self._state_of(0).get("shared")) and not self._has_other_size():
            self._shared = {**shared, "epoch": self._epochs.started}
            self._begin_rest(RestOfEpoch.of_state(shared), done - shared["at"])
        elif total is not None and (rest := RestOfEpoch.of(self._state_of(0), done, before, sampler)) is not None:
            at = max(total - self._begin_rest(rest), 0)
            self._shared = {**rest.state(), "at": at, "epoch": self._epochs.started}
            self._set_done(at)
        else:
            rank_zero_warn(not_shared_out(before, now))
            shared = done * before // now
            self._place(shared)
            self._discards = [
                0 if isinstance(order, EpochOrder) else self._position(loader, shared)
                for loader, order in zip(self._loaders, self._orders, strict=True)
            ]
            self._set_done(shared)

    def _begin_rest(self, rest: RestOfEpoch, done: int = 0) -> int:
        """Let the next iterator serve this rank's share of the rest of an epoch.

        Args:
            rest: The rest.
            done: The number of batches of the share that are done.

        Returns:
            The number of batches in the share.

        """
        sampler, rank = _sampler(self._loaders[0]), self._trainer.global_rank
        share = rest.share(self._trainer.world_size, sampler.batch_size, sampler.drop_last)
        order = self._orders[0]
        if not isinstance(order, EpochOrder):
            # For this epoch only, in which its state would not help.
            order = self._orders[0] = EpochOrder(self._loaders[0])
            self._load_others()
        order.begin_with(share, rank, done, self._state_of(0))
        return len(share(rank))

    def _total(self) -> int | None:
        """Return the number of batches in an epoch of the only loader; ``None`` if there are several, or if unknown."""
        loaders, limits = self._loaders, self._combined.limits or [float("inf")]
        if len(loaders) != 1 or not is_indexed(loaders[0]):
            return None
        return int(min(len(loaders[0]), limits[0]))

    def _is_divided_anew(self) -> bool:
        """Return whether the rest of the epoch was shared out before, or has another batch size now."""
        return bool(self._state_of(0).get("shared") or (self._has_other_size() and len(self._loaders) == 1))

    def _has_other_size(self) -> bool:
        known, present = self._state_of(0).get("recipe"), recipe(_sampler(self._loaders[0]))
        return bool(known and present and known["batch_size"] != present["batch_size"])

    def _set_done(self, done: int) -> None:
        current = self._batches
        current.completed += done - current.processed
        current.ready = current.started = current.processed = done

    # -- an epoch ----------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        """Reset the epoch's loop without Lightning's warning of loaders that are not resumable."""
        loop = self._loop.epoch_loop
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")
            type(loop).reset(loop)

    def _begin_epoch(self, fetcher: Any) -> None:
        loop = self._loop.epoch_loop
        begins = self._begins_next and self._batches.ready == 0
        if begins:
            self._begins_next = False
            self._prepare_next()
        self._discard(fetcher)
        self._states.clear()
        if self._shared and self._shared["epoch"] != self._epochs.started:
            self._shared = {}
            self._follow()
        iterator, states = self._combined._iterator, [order.before() for order in self._orders]
        type(loop).on_run_start(loop, fetcher)
        if begins and self._combined._iterator is iterator:
            # Lightning would take the iterator from before the end of the last epoch was made up for.
            iter(fetcher)
        if self._combined._iterator is not iterator:
            for order, before in zip(self._orders, states, strict=True):
                order.begin(before)

    def _discard(self, fetcher: Any) -> None:
        discards, self._discards = self._discards, [0] * len(self._orders)
        if fetcher.length is None:
            # It has fetched a batch already.
            for _ in range(max(discards)):
                next(fetcher)
            fetcher.fetched = len(fetcher.batches)
            return
        assert self._combined._iterator is not None
        for iterator, number in zip(self._combined._iterator.iterators, discards, strict=True):
            for _ in range(number):
                next(iterator)

    # -- a replacement -----------------------------------------------------------------------------------------

    def seek(self) -> None:
        """Continue behind the loops' current batch, in a replacement that has just restored the loops."""
        self._is_loaded = False
        fetcher = self._loop._data_fetcher
        assert fetcher is not None
        done = self._batches.ready
        for loader in self._loaders:
            _set_sampler_epoch(loader, self._epochs.processed)
        is_over = fetcher.length is not None and done >= fetcher.length
        shared = None if is_over else self._state_of(0).get("shared")
        if shared:
            self._shared = shared
            self._begin_rest(RestOfEpoch.of_state(shared), done - shared["at"])
        if fetcher.length is not None and all(isinstance(order, EpochOrder) for order in self._orders):
            if is_over:
                self._prepare_next()
            elif not shared:
                self._place(done)
            if not is_over:
                iter(fetcher)
            fetcher.fetched = done
            fetcher.done = is_over
        else:
            for i, order in enumerate(self._orders):
                order.begin_at(self._state_of(i), 0)
            states = [order.before() for order in self._orders]
            iter(fetcher)
            for order, before in zip(self._orders, states, strict=True):
                order.begin(before)
            for _ in range(done):
                next(fetcher)

    # -- other ranks -------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The number of the present batch in its epoch, from 0 on."""
        return int(self._batches.ready) - 1

    def why_batches_unknown(self, rank: int, position: int) -> str | None:
        """Return why the batches of other ranks in the present epoch cannot be known; ``None`` if they can.

        Args:
            rank: The first whose batches will be asked for.
            position: The number of the first of these.

        """
        return self._others.why_unknown(rank, position) if self._others is not None else None

    def batches_of(self, rank: int, positions: Iterable[int]) -> list[Any]:
        """Return batches of another rank in the present epoch, as its loader gives them: on the CPU.

        Args:
            rank: Its rank among all.
            positions: Their numbers, as in :attr:`position`.

        Returns:
            The batches; ``None`` in the place of one that the rank does not have.

        """
        first = self._shared["at"] if self._shared else 0
        assert self._others is not None
        return self._others.batches(rank, [position - first for position in positions])

    def release_batches(self) -> None:
        """Forget the batches of other ranks, and end the processes that load them."""
        if self._others is not None:
            self._others.close()

    def _load_others(self) -> None:
        trainer = self._trainer
        self._others = CombinedRankBatches(self._combined, self._orders, trainer.global_rank, trainer.world_size)

    @property
    def _batches(self) -> Any:
        return self._loop.epoch_loop.batch_progress.current

    @property
    def _epochs(self) -> Any:
        return self._loop.epoch_progress.current

    @property
    def _loaders(self) -> list[Any]:
        return self._loop._combined_loader.flattened if self._loop._combined_loader is not None else []

    @property
    def _combined(self) -> CombinedLoader:
        combined = self._loop._combined_loader
        assert combined is not None
        return combined


def _knows_place(loader: Any) -> bool:
    """Return whether a loader has a state that tells its place in the data."""
    # Lightning's wrapper draws the order of the user's sampler anew whenever it is asked for an iterator.
    inner = getattr(_sampler(loader), "sampler", None)
    return hasattr(loader, "state_dict") and not isinstance(inner, DistributedSamplerWrapper)


def _sampler(loader: Any) -> Any:
    """Return the batch sampler, or else the sampler, that a loader has of its own."""
    sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if sampler is None else sampler
    return sampler.own if isinstance(sampler, EpochOrder) else sampler
