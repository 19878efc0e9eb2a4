"""Matrix factorisation by alternating least squares."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from benchmarks.paper.data import Ratings
from benchmarks.paper.training import Training
from lightning_scar.core.skeleton import Path

_RANK = 5
#: Of the regularisation, a rating (Zhou et al. 2008, section 3.1).
_WEIGHT = 0.05


class _Table(NamedTuple):
    """Ratings as a matrix of users and films: the stars (0 for none), and which there are."""

    stars: Tensor
    known: Tensor


class Factorization(Training):
    """Users and films as vectors whose products are stars; an iteration solves for all users, then for all films.

    Args:
        ratings: Gives who gave which film how many stars.
        seed: Of the initial vectors.

    """

    def __init__(self, ratings: Callable[[], Ratings], seed: int) -> None:
        self.iteration = 0
        self._ratings = ratings
        stars = _table(ratings).stars
        generator = torch.Generator().manual_seed(seed)
        self.users = torch.rand(stars.shape[0], _RANK, generator=generator)
        self.films = torch.rand(stars.shape[1], _RANK, generator=generator)

    @override
    def step(self) -> None:
        stars, known = _table(self._ratings)
        self.users.copy_(_solved(stars, known, self.films))
        self.films.copy_(_solved(stars.T, known.T, self.users))
        self.iteration += 1

    @override
    def loss(self) -> float:
        stars, known = _table(self._ratings)
        errors = torch.linalg.vector_norm((self.users @ self.films.T).sub_(stars).mul_(known)).square()
        sizes = known.sum(1) @ self.users.square().sum(1) + known.sum(0) @ self.films.square().sum(1)
        return float((errors + _WEIGHT * sizes) / known.sum())

    @override
    def checkpoint(self) -> dict[str, Any]:
        return {"state_dict": {"users": self.users, "films": self.films}}

    @override
    def optimizers(self) -> Mapping[Path, Optimizer]:
        return {}

    @override
    def parameters(self) -> list[Tensor]:
        return [self.users, self.films]

    @override
    def recovered(self) -> None:
        pass


@lru_cache
def _table(ratings: Callable[[], Ratings]) -> _Table:
    users, films, stars = ratings()
    table = torch.zeros(int(users.max()) + 1, int(films.max()) + 1)
    known = torch.zeros_like(table)
    table[users, films] = stars
    known[users, films] = 1
    return _Table(table, known)


def _solved(stars: Tensor, known: Tensor, factors: Tensor) -> Tensor:
    """The vectors of the rows that fit best to those of the columns."""
    squares = (factors.unsqueeze(2) * factors.unsqueeze(1)).flatten(1)
    normal = (known @ squares).unflatten(1, (_RANK, _RANK))
    normal += (_WEIGHT * known.sum(1)).view(-1, 1, 1) * torch.eye(_RANK)
    return torch.linalg.solve(normal, stars @ factors)
