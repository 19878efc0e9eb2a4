"""``SCARLoop``: priority checkpoints for a training written as a loop, in plain PyTorch or in Lightning Fabric."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Any, Literal, TypedDict

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_scar.core.compatibility import ModelMismatchError, check_fit, check_ranks_agree
from lightning_scar.core.random_generators import random_generators, set_random_generators
from lightning_scar.core.ranks import Ranks
from lightning_scar.core.resumption import newest_heads
from lightning_scar.core.running_checkpoint import RunningCheckpoint
from lightning_scar.core.selection import Candidates
from lightning_scar.core.settings import PolicyName, Settings
from lightning_scar.core.stats import Stats
from lightning_scar.core.training_state import TrainingState
from lightning_scar.schedule import Schedule, check_intervals


class Options(TypedDict, total=False):
    """The options of :class:`SCARLoop`, which tells what they mean."""

    every_n_steps: int | None
    every_n_seconds: float | None
    fraction: float
    policy: PolicyName | Callable[[Candidates], Tensor]
    block_size: int | None
    max_age: int | None
    full_every_n_saves: int | None
    staging: Literal["lazy", "eager"]
    resume: bool
    strict: bool
    save_on_exception: bool
    on_write_error: Literal["warn", "raise"]
    storage_options: dict[str, Any] | None


class SCARLoop:
    """Saves the blocks of a training loop that moved furthest, often, and resumes from them.

    The first save is full; the later ones write the fraction of the state that moved furthest since it was saved (SCAR,
    ICML 2019, section 4.2). With a process group every rank saves its share.

    Args:
        dirpath: The running checkpoint's directory, a path or any fsspec URL.
        state: What to save, by name: modules, optimizers, schedulers, and anything else with ``state_dict`` and
            ``load_state_dict``; as for ``fabric.save``. Wrapped or not.
        every_n_steps: Save every so many optimizer steps.
        every_n_seconds: Save every so many seconds, at the next optimizer step. Give one of the two.
        fraction: The share of the state's bytes that one save may write, in (0, 1].
        policy: ``"distance"``, ``"round_robin"``, ``"random"``, or a function from
            :class:`~lightning_scar.core.selection.Candidates` to one priority a block.
        block_size: Bytes of a parameter's rows in a block; ``None`` aims at 4096 blocks of 4 KiB to 4 MiB.
        max_age: Steps after which a block is due whatever its priority; ``None`` for never.
        full_every_n_saves: Make every so-manieth save a full one, so that ``load(dirpath, consistent=True)`` finds a
            recent state of one single step; ``None`` for the first and the last only.
        staging: ``"lazy"`` scores and copies beside the next forward and backward, ``"eager"`` at once.
        resume: Whether to go on from what ``dirpath`` holds. ``False`` begins anew, over it.
        strict: Whether a running checkpoint of another model is an error; ``False`` loads what fits.
        save_on_exception: Whether to save when the ``with`` block ends with an exception.
        on_write_error: ``"warn"`` goes on training when a save cannot be written, ``"raise"`` stops it.
        storage_options: Passed to the file system of ``dirpath``.

    Attributes:
        batches: How often :meth:`step` was called, those calls included that were resumed from.
        steps: In how many of them an optimizer made a step.
        stats: Counters of this run, see :class:`~lightning_scar.core.stats.Stats`.

    Raises:
        ValueError: If a value is out of range, or there is not exactly one interval.
        TypeError: If something in ``state`` has no state.

    Example::

        >>> import torch
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> data = [torch.randn(2, 4) for _ in range(6)]
        >>> state = {"model": model, "optimizer": optimizer}
        >>> with SCARLoop("memory://loop-example", state, every_n_steps=2) as scar:
        ...     for batch in data[scar.resume() :]:
        ...         optimizer.zero_grad()
        ...         model(batch).square().mean().backward()
        ...         optimizer.step()
        ...         scar.step()
        >>> with SCARLoop("memory://loop-example", state, every_n_steps=2) as scar:
        ...     scar.resume()  # all of it is done
        6

    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = None,
        fraction: float = 0.125,
        policy: PolicyName | Callable[[Candidates], Tensor] = "distance",
        block_size: int | None = None,
        max_age: int | None = None,
        full_every_n_saves: int | None = None,
        staging: Literal["lazy", "eager"] = "lazy",
        resume: bool = True,
        strict: bool = True,
        save_on_exception: bool = True,
        on_write_error: Literal["warn", "raise"] = "warn",
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        self._settings = Settings(fraction, policy, block_size, max_age, staging, on_write_error)
        check_intervals(full_every_n_saves, every_n_steps=every_n_steps, every_n_seconds=every_n_seconds)
        self.dirpath = os.fspath(dirpath)
        self.batches = 0
        self.steps = 0
        self.stats = Stats()
        self._state = TrainingState.of(state)
        self._schedule = Schedule(every_n_steps, every_n_seconds, full_every_n_saves)
        self._resume = resume
        self._strict = strict
        self._save_on_exception = save_on_exception
        self._storage_options = storage_options
        self._running: RunningCheckpoint | None = None
        self._hooks: list[RemovableHandle] = []
        self._has_stepped = False
        self._sigterm: _Sigterm | None = None

    def __enter__(self) -> Self:
        """Returns itself; the end of the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes it; behind an exception a run is not finished."""
        if error is None:
            self.close()
        else:
            self._abandon()

    # -- beginning and end ---------------------------------------------------------------------------------------

    def resume(self, weights_only: bool | None = None) -> int:
        """Takes the directory, and goes on from what it holds. To be called once, right before the loop.

        With several ranks a collective. Modules, optimizers, schedulers, other objects and the random generators of
        this process get what was saved; the loop's data are for the caller to skip.

        Args:
            weights_only: As in ``torch.load``, for everything but large tensors, which are never unpickled.

        Returns:
            How many batches are done: calls of :meth:`step`. 0 if the directory is new. On another number of ranks it
            is what these would have done; rather too few than too many.

        Raises:
            StorageError: If the directory holds something else, a newer format, or is not the same on all ranks.
            DirectoryInUseError: If another live run uses it.
            ModelMismatchError: If another model wrote it, or a Lightning Trainer, or the ranks' models differ.
            RuntimeError: If it was called before.

        """
        if self._running is not None or self._hooks:
            raise RuntimeError("resume() was called before; make a new object for another loop")
        ranks = Ranks.of_default_group()
        self._running = RunningCheckpoint(self.dirpath, self._settings, self._storage_options, ranks)
        self.stats = self._running.stats
        try:
            check_ranks_agree(ranks, self._training_state().state_dict())
            if self._resume and self._is_something_there(ranks):
                self._restore(weights_only)
        except BaseException:
            self._give_up()
            raise
        self._schedule.begin(self.steps)
        self._watch()
        return self.batches

    def close(self) -> None:
        """Saves everything, waits until it is written, and marks the run as finished.

        Raises:
            OSError: If a write failed and ``on_write_error="raise"``.

        """
        if self._running is None:
            return
        try:
            self._save(full=True, finished=True)
        finally:
            self._give_up()

    def _abandon(self) -> None:
        """Saves what there is while an exception is under way, which is the one that the user must see."""
        if self._running is None:
            return
        try:
            # A step that is not counted yet would be made twice.
            if self._save_on_exception and not self._has_stepped and self.steps != self._schedule.last_full_step:
                self._save(full=True)
            self._give_up()
        except Exception as error:
            warnings.warn(f"lightning-scar: the last save failed too: {error!r}", stacklevel=3)

    def _give_up(self) -> None:
        running, self._running = self._running, None
        for hook in self._hooks:
            hook.remove()
        if self._sigterm is not None:
            self._sigterm.restore()
        if running is not None:
            running.close()

    def _watch(self) -> None:
        """Sees optimizers step, whoever calls them, and SIGTERM."""
        assert self._running is not None
        running, own = self._running, {id(optimizer) for optimizer in self._training_state().inner_optimizers}

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._has_stepped |= id(optimizer) in own

        self._hooks = [
            register_optimizer_step_pre_hook(lambda *args: running.fence()),
            register_optimizer_step_post_hook(stepped),
        ]
        if threading.current_thread() is threading.main_thread():
            self._sigterm = _Sigterm()

    def _is_something_there(self, ranks: Ranks) -> bool:
        heads = ranks.together(lambda: newest_heads(self.dirpath, self._storage_options))
        return bool(ranks.gather(bool(heads))[0])

    # -- a batch -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Counts a batch, and begins a save if one is due. To be called last in the loop's body, for every batch.

        Batches without an optimizer step, as in gradient accumulation, are counted but never saved behind.

        Raises:
            RuntimeError: If :meth:`resume` was not called before, or :meth:`close` was.
            OSError: If an earlier write failed and ``on_write_error="raise"``.

        """
        if self._running is None:
            raise RuntimeError(
                "call resume() once before the loop, and step() not behind close(); to begin anew, give resume=False "
                f"to {type(self).__name__}"
            )
        self.batches += 1
        has_stepped, self._has_stepped = self._has_stepped, False
        if not has_stepped:
            return
        self.steps += 1
        if self._sigterm is not None and self._sigterm.received:
            self._stop(self._sigterm)
        elif self._schedule.is_due(self.steps):
            self._save(full=self._schedule.is_full(self.steps))

    def fence(self) -> None:
        """Waits until the save under way is copied.

        To be called before weights are changed by something else than an optimizer, in a way that autograd does not
        see: through ``.data``, by a collective, or by a fused kernel.
        """
        if self._running is not None:
            self._running.fence()

    def _save(self, full: bool, finished: bool = False) -> None:
        assert self._running is not None
        self._schedule.note(self.steps, full)
        info = {"finished": finished, "global_step": self.steps, "batches": self.batches}
        parts = self._training_state().live_parts
        self._running.save(self._dump(), self.steps, **parts, full=full, info=info)
        self._running.stage()

    def _stop(self, sigterm: "_Sigterm") -> None:
        self._save(full=True)
        self._give_up()
        sigterm.proceed()

    # -- the state -----------------------------------------------------------------------------------------------

    def _training_state(self) -> TrainingState:
        return self._state

    def _dump(self) -> dict[str, Any]:
        """The checkpoint dict, with references to live tensors."""
        return {
            **self._training_state().dump(),
            "global_step": self.steps,
            "loop": {"batches": self.batches, "world_size": _world_size(), **self._place()},
            "random": random_generators(),
        }

    def _restore(self, weights_only: bool | None) -> None:
        assert self._running is not None
        state = self._training_state()
        restored = self._running.restore(weights_only, initial={"state_dict": state.state_dict()})
        checkpoint = restored.checkpoint
        if "loop" not in checkpoint:
            raise ModelMismatchError(
                f"{self.dirpath} was written by a Trainer, so it has no place in a loop. Use another dirpath; to start "
                f"from its weights, `model.load_state_dict(lightning_scar.load({self.dirpath!r})['state_dict'])`."
            )
        fits = check_fit(self.dirpath, checkpoint, state.state_dict(), self._strict)
        state.load(checkpoint, self.dirpath, strict=self._strict and fits)
        if restored.own is not None and restored.world_size == self._running.ranks.world_size:
            set_random_generators(restored.own["random"])
        self._take_place(checkpoint)
        if self._running.ranks.rank == 0:
            say(f"resuming from the running checkpoint {self.dirpath}: step {self.steps}, {self._running.recovery}")

    def _place(self) -> dict[str, Any]:
        """What else tells where in its data the loop is."""
        return {}

    def _take_place(self, checkpoint: dict[str, Any]) -> None:
        """Goes on where a checkpoint is."""
        place = checkpoint["loop"]
        self.steps = checkpoint["global_step"]
        self.batches = place["batches"] * place["world_size"] // _world_size()


class _Sigterm:
    """Notes SIGTERM in its handler, and leaves everything else to the loop."""

    def __init__(self) -> None:
        self.received = False
        self._handler = self._note
        self._previous = signal.signal(signal.SIGTERM, self._handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True

    def proceed(self) -> None:
        """Lets the signal do what it would have done."""
        signal.raise_signal(signal.SIGTERM)

    def restore(self) -> None:
        """Puts the previous handler back, unless someone else has taken over since."""
        if signal.getsignal(signal.SIGTERM) == self._handler:
            signal.signal(signal.SIGTERM, self._previous)


def say(text: str) -> None:
    """Tells the user something, in a line of its own."""
    print(f"lightning-scar: {text}", file=sys.stderr, flush=True)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
