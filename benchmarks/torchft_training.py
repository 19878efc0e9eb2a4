"""A plain training loop on one rank, with torch's DDP or torchft's: run by the Python that has torchft.

It imports neither Lightning nor a benchmark that does.
"""

import argparse
import importlib
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from benchmarks.gate import Gate, batches, perceptron
from benchmarks.step_log import StepLog


def serve(heartbeat: float) -> NoReturn:
    """Run torchft's lighthouse, and print its address."""
    native: Any = importlib.import_module("torchft._torchft")
    lighthouse = native.LighthouseServer(
        bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=1000, heartbeat_timeout_ms=int(heartbeat * 1000)
    )
    print(lighthouse.address(), flush=True)
    while True:
        time.sleep(60)


class Trained:
    """A model, its optimizer, and what torchft needs.

    Args:
        options: The command line.

    """

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.bare = perceptron(options.width)
        self.manager: Any = None
        self.step = 0
        if options.kind == "plain":
            self.model: nn.Module = nn.parallel.DistributedDataParallel(self._join(options))
            self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=1e-4)
            return
        torchft: Any = importlib.import_module("torchft")
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        inner = torch.optim.SGD(self.bare.parameters(), lr=1e-4)
        self.manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=10)),
            load_state_dict=lambda state: self.bare.load_state_dict(state),
            state_dict=lambda: self.bare.state_dict(),
            min_replica_size=2,
            replica_id=f"rank-{options.rank}-",
            store_addr="127.0.0.1",
            store_port=self._store.port,
            rank=0,
            world_size=1,
            lighthouse_addr=options.lighthouse,
            hostname="127.0.0.1",
            timeout=timedelta(seconds=30),
        )
        self.model = torchft.DistributedDataParallel(self.manager, self.bare)
        self.optimizer = torchft.Optimizer(self.manager, inner)

    def _join(self, options: argparse.Namespace) -> nn.Module:
        host, port = options.store.split(":")
        store = TCPStore(host, int(port), is_master=False)
        group = PrefixStore("plain", store)
        dist.init_process_group("gloo", store=group, rank=options.rank, world_size=options.ranks)
        return self.bare

    def train(self, batch: torch.Tensor) -> None:
        """Make one step."""
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.step = self.manager.current_step() if self.manager is not None else self.step + 1


def main() -> None:
    """Train in turn with others (``--store``), or until it is terminated (``--folder``)."""
    flags = argparse.ArgumentParser(description="a training with torchft or plain torch")
    flags.add_argument("--kind", choices=("plain", "torchft", "lighthouse"), required=True)
    flags.add_argument("--rank", type=int, default=0)
    flags.add_argument("--ranks", type=int, default=2)
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--lighthouse")
    flags.add_argument("--heartbeat", type=float, default=5.0, help="torchft's own default is 5 seconds")
    flags.add_argument("--store", help="host and port of the store that assigns turns")
    flags.add_argument("--folder", type=Path, help="where to log the steps")
    flags.add_argument("--pause", type=float, default=0.0, help="seconds of each step in which a worker only waits")
    options = flags.parse_args()
    if options.kind == "lighthouse":
        serve(options.heartbeat)
    trained, batch = Trained(options), batches(options.width)
    if options.folder is not None:
        log = StepLog(options.folder, options.rank)
        while True:
            time.sleep(options.pause)
            trained.train(batch)
            log.add(trained.step)
    gate = Gate(options.store, options.kind, options.rank)
    while not gate.is_over:
        trained.train(batch)
        gate.stepped()


if __name__ == "__main__":
    main()
