"""Train a CNN on MNIST digits. Kill it at any time and run it again: it resumes.

python examples/mnist.py
"""

from lightning import Trainer, seed_everything

from digits import DigitClassifier, Digits
from lightning_scar import SCARCheckpoint


def main() -> None:
    seed_everything(1)
    trainer = Trainer(
        max_epochs=10,
        callbacks=[SCARCheckpoint("runs/mnist/scar", every_n_train_steps=25, fraction=0.125)],
    )
    trainer.fit(DigitClassifier(), datamodule=Digits())


if __name__ == "__main__":
    main()
