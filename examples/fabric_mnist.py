"""Train a CNN on MNIST digits with Lightning Fabric. Kill it and run it again: it resumes.

python examples/fabric_mnist.py
"""

from argparse import ArgumentParser

import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.utils.data import DataLoader

from images import DigitNet, digit_sets
from lightning_scar import SCARCheckpointIO, SCARLoop


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="runs/fabric_mnist", help="where to save")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    fabric = Fabric(accelerator="cpu", devices=1, plugins=[SCARCheckpointIO()])
    fabric.launch()
    fabric.seed_everything(1)
    train, held_out = digit_sets()
    model = DigitNet()
    model, optimizer = fabric.setup(model, Adam(model.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(train, batch_size=32, shuffle=True, drop_last=True))
    images, labels = held_out.tensors

    state = {"model": model, "optimizer": optimizer}
    with SCARLoop(f"{options.dir}/scar", state, every_n_steps=25, fraction=0.125) as scar:
        scar.resume()
        for epoch in range(scar.epoch, options.epochs):
            for batch in scar.batches(loader):
                fabric.backward(cross_entropy(model(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()
                scar.step()
            with torch.no_grad():
                accuracy = (model(images).argmax(1) == labels).float().mean().item()
            fabric.print(f"epoch {epoch}: accuracy {accuracy:.3f}, step {scar.steps}")
            # Now and then Fabric's own save, too: here through the same files, one delta each.
            fabric.save(f"{options.dir}/epochs", {**state, "step": scar.steps})


if __name__ == "__main__":
    main()
