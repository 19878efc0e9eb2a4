"""Models in torch: the paper's regression and CNN, and two that it lacks, a small GPT and a recommender."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks import data
from benchmarks.data import Images
from benchmarks.gpt import GPT, Size
from benchmarks.paper.training import Batch, ModuleTraining
from benchmarks.rework import Regression

#: Samples over which losses are taken.
_HELD = 250
_SMALL_GPT = Size(layers=2, width=64, heads=2, vocabulary=128, positions=64, sequence=64)


class Recommender(nn.Module):
    """Stars from an embedding of the user and one of the film; only the rows of a batch get gradients."""

    def __init__(self, users: int, films: int, width: int) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width, sparse=True)
        self.films = nn.Embedding(films, width, sparse=True)
        self.layers = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 1))
        for table in (self.users, self.films):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, users: Tensor, films: Tensor) -> Tensor:
        both = torch.cat([self.users(users), self.films(films)], dim=1)
        return 3.5 + self.layers(both).squeeze(1)  # type: ignore[no-any-return]


def regression(images: Callable[[], Images], rate: float, seed: int) -> ModuleTraining:
    """Logistic regression on digits by minibatch SGD, 1,000 of them at a time."""
    torch.manual_seed(seed)
    model = Regression(images().pixels.shape[1])
    return classification(model, images(), lambda parameters: torch.optim.SGD(parameters, lr=rate), 1000, _HELD, seed)


def cnn(seed: int) -> ModuleTraining:
    """Two convolutions and three linear layers on MNIST by Adam."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )
    return classification(
        model, data.mnist(), lambda parameters: torch.optim.Adam(parameters, lr=1e-3), 64, _HELD, seed
    )


def gpt(seed: int) -> ModuleTraining:
    """A GPT of 112 thousand parameters on the letters of the King James Bible by AdamW."""
    torch.manual_seed(seed)
    text, length = data.bible(), _SMALL_GPT.sequence + 1

    def sequences(starts: Tensor) -> Batch:
        return (text[starts.unsqueeze(1) + torch.arange(length)],)

    def objective(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0][:, :-1]).flatten(0, 1), batch[0][:, 1:].flatten())

    return ModuleTraining(
        GPT(_SMALL_GPT),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lambda generator: sequences(torch.randint(len(text) - length, (12,), generator=generator)),
        objective,
        sequences(torch.arange(12) * (len(text) // 13)),
        seed,
    )


def recommender(movielens: Path | None, seed: int) -> ModuleTraining:
    """Embeddings and a perceptron on MovieLens by Adagrad, 1,024 ratings at a time."""
    torch.manual_seed(seed)
    users, films, stars = data.movielens(movielens)
    held = torch.arange(20 * _HELD) * (len(stars) // (20 * _HELD))

    def rated(chosen: Tensor) -> Batch:
        return users[chosen], films[chosen], stars[chosen]

    return ModuleTraining(
        Recommender(int(users.max()) + 1, int(films.max()) + 1, 16),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
        lambda generator: rated(torch.randint(len(stars), (1024,), generator=generator)),
        lambda model, batch: mse_loss(model(batch[0], batch[1]), batch[2]),
        rated(held),
        seed,
    )


def classification(
    model: nn.Module,
    images: Images,
    optimizer: "Callable[..., torch.optim.Optimizer]",
    size: int,
    held: int,
    seed: int,
) -> ModuleTraining:
    """Trains a model to tell digits.

    Args:
        model: Gives the logits of pictures, one a row.
        images: The pictures.
        optimizer: Makes its optimizer.
        size: Pictures in a batch.
        held: About how many pictures the loss is taken over.
        seed: Of the batches.

    """

    def batch(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images.labels), (size,), generator=generator)
        return images.pixels[chosen], images.labels[chosen]

    stride = max(1, len(images.labels) // held)
    return ModuleTraining(
        model,
        optimizer,
        batch,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        (images.pixels[::stride], images.labels[::stride]),
        seed,
    )
