"""Cover: the survivors compute the missing workers' batches, so that each step is the same as without a failure.

With M of N workers present, a step's gradient is to be the mean over N. Each survivor computes its parts of the missing
batches by itself, and adds their gradients in the backward pass of its own batch, all scaled by M / N. Then DDP takes
the mean over M.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_scar.continuation.alone import alone
from lightning_scar.continuation.buffers import SharedBuffers
from lightning_scar.continuation.examination import examine
from lightning_scar.continuation.feasibility import warn_of_shrinking
from lightning_scar.continuation.outages import Finding, Outages
from lightning_scar.continuation.parts import Part, deal, part_of
from lightning_scar.continuation.protocol import Training
from lightning_scar.continuation.side_gradients import SideGradients
from lightning_scar.continuation.snapshot import random_state, set_random_state
from lightning_scar.continuation.step_generators import StepGenerators
from lightning_scar.continuation.step_tensors import StepTensors
from lightning_scar.core.random_generators import kept_generators, set_random_generators
from lightning_scar.elastic.worker.errors import GroupLostError
from lightning_scar.elastic.worker.member import Member


class Cover:
    """Computes the missing workers' batches.

    Args:
        training: The training.
        member: This worker's membership in the job.
        outages: The record of outages; knows whether covering is possible.
        generators: The random generators of all workers, as far as they are known.
        tensors: What a training step changes in place.

    """

    def __init__(
        self, training: Training, member: Member, outages: Outages, generators: StepGenerators, tensors: StepTensors
    ) -> None:
        self._training = training
        self._member = member
        self._outages = outages
        self._generators = generators
        self._tensors = tensors
        #: The number of the last generation with a covered step.
        self._generation = -1
        #: The buffers of slot 0 before the first of a step's batches, if this worker computes the batches of slot 0.
        self._beginning: list[Tensor] = []

    def begin_step(self) -> None:
        """Keep what the batches of a missing worker begin with, before the first of several batches of a step."""
        has_slot_0 = not self._member.is_full and self._member.is_leader and self._member.slot > 0
        self._beginning = [buffer.clone() for buffer in self._tensors.present()] if has_slot_0 else []

    def is_due(self, batch: Any) -> bool:
        """Return whether the next step is to be covered. When a worker is missing for the first time, find out.

        Args:
            batch: The present batch of this worker, as the training step gets it.

        """
        if self._member.is_full or not self._outages.covers:
            return False
        if self._outages.finding is None:
            self._examine(batch)
        return self._outages.covers

    def _examine(self, batch: Any) -> None:
        """Let all survivors agree on a finding."""
        training, generation, own = self._training, self._member.generation, self._member.slot
        assert generation is not None
        missing = [slot for slot in range(self._member.world_size) if slot not in generation.members]
        # One whose batches this worker will compute, if it computes whole ones.
        slot = missing[generation.members.index(own) % len(missing)]
        why = training.why_unknown(slot) or ""
        finding = self._agreed(Finding.IMPOSSIBLE if why else Finding.SLICED)
        if finding != Finding.IMPOSSIBLE:
            loaded = (batch for slot in (slot, own) for batch in training.batches_of(slot)[-1:])
            finding, why = examine(training, self._tensors, batch, loaded)
            if any(wrapper.find_unused_parameters for wrapper in training.wrappers()):
                # It would take what was examined for a use of the parameters.
                training.wrap()
            finding = self._agreed(finding)
        self._outages.finding = finding
        if not self._member.is_leader:
            return
        why = why or "of the batch of another worker"
        if finding == Finding.IMPOSSIBLE:
            warn_of_shrinking(self._outages.policy, why)
        elif finding == Finding.WHOLE:
            print(f"lightning-scar: missing batches are computed whole, because {why}", file=sys.stderr, flush=True)

    def _agreed(self, finding: Finding) -> Finding:
        smallest = torch.tensor(finding, device=next(self._training.module.parameters()).device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        self._member.check_health()
        return Finding(int(smallest))

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Compute this worker's parts, and add their gradients in the next backward pass, that of its own batch.

        Args:
            step: The number of completed steps.

        """
        generation = self._member.generation
        outage, is_sliced = self._outages.current, self._outages.finding == Finding.SLICED
        assert generation is not None
        assert outage is not None
        members, world_size = generation.members, self._member.world_size
        buffers, own_random = SharedBuffers(self._training, self._tensors), kept_generators()
        gradients = SideGradients(self._training.module)
        with self._apart_from_static_graph(generation.number):
            for part in deal(members, world_size, is_sliced)[self._member.slot]:
                self._compute(part, step, gradients, buffers)
                set_random_generators(own_random())
        if self._member.is_broken:
            raise GroupLostError
        scale = len(members) / world_size
        with gradients.added(scale), self._training.counting_covered(scale):
            yield
        buffers.end()
        outage.covered_batches += (world_size - len(members)) * self._training.batches_in_step

    @contextmanager
    def _apart_from_static_graph(self, generation: int) -> Iterator[None]:
        """Wrap the model anew if its wrapper would learn a static graph from what is computed in this context."""
        is_new, self._generation = self._generation != generation, generation
        if is_new and any(wrapper.static_graph for wrapper in self._training.wrappers()):
            self._training.unwrap()
            yield
            self._training.wrap()
        else:
            yield

    def _compute(self, part: Part, step: int, gradients: SideGradients, buffers: SharedBuffers) -> None:
        training = self._training
        batches = training.batches_of(part.slot)
        if (random := self._generators.of(part.slot, step)) is not None:
            set_random_state(random)
        if part.slot == 0 and self._beginning:
            buffers.set(self._beginning)
        for number, batch in enumerate(batches, 1):
            piece, share = part_of(batch, part.number, part.of)
            if share:
                with alone(training, share), gradients.collecting(share / training.micro_batches):
                    training.compute_gradient(piece, ago=training.batches_in_step - number)
        if part.of == 1:
            self._generators.note(step + 1, random_state(), slot=part.slot)
        buffers.restore(of_slot_0=part.slot == 0)
