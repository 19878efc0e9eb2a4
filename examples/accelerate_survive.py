"""Train on MNIST digits with Accelerate, kill a worker, and see the others continue with its replacement.

Until it joins, they compute the batches of the dead worker, too.

lightning-scar run --nproc-per-node 3 examples/accelerate_survive.py
"""

import os
import signal
import time
from argparse import ArgumentParser

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.utils.data import DataLoader

from images import DigitNet, digit_sets
from lightning_scar import SCARAccelerator, SCARContinuation


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kill", type=int, default=0, help="the worker to kill")
    parser.add_argument("--step", type=int, default=20, help="the step after which it is killed")
    parser.add_argument("--on-failure", default="cover", help="cover, shrink, buffer or wait")
    parser.add_argument("--dir", default="runs/accelerate_survive/scar", help="where to save")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between steps: digits are learned too fast")
    options = parser.parse_args()

    continuation = SCARContinuation(on_failure=options.on_failure, backend="gloo")  # before the Accelerator
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    scar = SCARAccelerator(
        accelerator, options.dir, every_n_steps=25, fraction=0.125, resume=False, continuation=continuation
    )
    set_seed(1)
    model = DigitNet()
    optimizer = Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(digit_sets()[0], batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    is_victim = accelerator.process_index == options.kill and not continuation.is_joiner

    def gradients(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = cross_entropy(model(images), labels)
        accelerator.backward(loss)
        return loss

    with scar:
        scar.resume()
        for epoch in range(scar.epoch, options.epochs):
            for batch in scar.batches(loader):
                if is_victim and scar.steps == options.step:
                    os.kill(os.getpid(), signal.SIGKILL)
                loss = scar.training_step(gradients, batch)
                scar.step()
                time.sleep(options.pause)
            accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, step {scar.steps}")
    accelerator.print(f"The first worker ends at step {scar.steps}. Outages: {continuation.outages}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
