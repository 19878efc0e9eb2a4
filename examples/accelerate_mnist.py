"""Train a CNN on MNIST digits with Accelerate. Kill it at any time and run it again: it resumes.

python examples/accelerate_mnist.py
torchrun --nproc-per-node 2 examples/accelerate_mnist.py     # or accelerate launch; each process saves its half
"""

from argparse import ArgumentParser

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from images import DigitNet, digit_sets
from lightning_scar import SCARAccelerator


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/accelerate_mnist/scar", help="where to save")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="stop after N optimizer steps, as if the time were up")
    options = parser.parse_args()

    # A shuffle with its own generator can be repeated in the middle of an epoch.
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    scar = SCARAccelerator(accelerator, options.dir, every_n_steps=25, fraction=0.125)
    set_seed(1)
    train, held_out = digit_sets()
    model = DigitNet()
    optimizer = Adam(model.parameters(), lr=1e-3)
    schedule = LinearLR(optimizer, 0.1, total_iters=100)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    test = accelerator.prepare(DataLoader(held_out, batch_size=100))

    with scar:
        scar.resume()
        for epoch in range(scar.epoch, options.epochs):
            for images, labels in scar.batches(loader):
                with accelerator.accumulate(model):
                    accelerator.backward(cross_entropy(model(images), labels))
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    scar.step()
                if scar.steps == options.steps:
                    return
            accelerator.print(f"epoch {epoch}: accuracy {accuracy(accelerator, model, test):.3f}, step {scar.steps}")
    accelerator.end_training()


@torch.no_grad()
def accuracy(accelerator: Accelerator, model: torch.nn.Module, loader: "DataLoader[torch.Tensor]") -> float:
    hits = [accelerator.gather_for_metrics((model(images).argmax(1) == labels).float()) for images, labels in loader]
    return float(torch.cat(hits).mean())


if __name__ == "__main__":
    main()
