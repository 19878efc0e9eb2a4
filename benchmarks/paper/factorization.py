"""Matrix factorisation by alternating least squares."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from benchmarks import data
from benchmarks.paper.training import Training

_RANK = 5
#: Of the regularisation, a rating (Zhou et al. 2008, section 3.1).
_WEIGHT = 0.05
#: Of a user's vector, a power of two: it loses no bits.
_SLIGHT = 2.0**-20


class _Table(NamedTuple):
    """Ratings as sparse matrices.

    Attributes:
        stars: Of users (rows) and films (columns).
        known: 1 where there are any.
        by_film: Both, transposed.
        users: Of each rating.
        films: Of each rating.
        counts: How many ratings each user and each film has, float32.

    """

    stars: Tensor
    known: Tensor
    by_film: tuple[Tensor, Tensor]
    users: Tensor
    films: Tensor
    counts: tuple[Tensor, Tensor]


class Factorization(Training):
    """Users and films as vectors whose products are stars; an iteration solves for all users, then for all films.

    Which distance counts is a matter of scale, so the state may be kept scaled by what the next iteration makes of it:
    a film's vector times the root of the number of its ratings, which is how far these ratings' stars move with it,
    and a user's by almost nothing, as it is solved for anew before anything depends on it.

    Args:
        movielens: The ratings' file, as in :func:`~benchmarks.data.movielens`.
        scaled: Whether the state is; else all vectors are kept as they are, as in the paper.
        seed: Of the initial vectors.

    """

    def __init__(self, movielens: Path | None, scaled: bool, seed: int) -> None:
        self.iteration = 0
        self._movielens = movielens
        users, films = _table(movielens).counts
        self._scales = torch.full((len(users), 1), _SLIGHT), films.sqrt().unsqueeze(1)
        if not scaled:
            self._scales = torch.ones(len(users), 1), torch.ones(len(films), 1)
        generator = torch.Generator().manual_seed(seed)
        self.users, self.films = (torch.rand(len(scale), _RANK, generator=generator) * scale for scale in self._scales)

    @override
    def step(self) -> None:
        table = _table(self._movielens)
        users = _solved(table.stars, table.known, table.counts[0], self.films / self._scales[1])
        films = _solved(*table.by_film, table.counts[1], users)
        self.users.copy_(users * self._scales[0])
        self.films.copy_(films * self._scales[1])
        self.iteration += 1

    @override
    def loss(self) -> float:
        table = _table(self._movielens)
        users, films = self.users / self._scales[0], self.films / self._scales[1]
        rated = data.movielens(self._movielens)
        errors = (users[table.users] * films[table.films]).sum(1).sub_(rated.stars).square().sum()
        sizes = sum(count @ own.square().sum(1) for count, own in zip(table.counts, (users, films), strict=True))
        return float((errors + _WEIGHT * sizes) / table.counts[0].sum())

    @override
    def checkpoint(self) -> dict[str, Any]:
        return {"state_dict": {"users": self.users, "films": self.films}}

    @override
    def parameters(self) -> list[Tensor]:
        return [self.users, self.films]


@lru_cache
def _table(path: Path | None) -> _Table:
    users, films, stars = data.movielens(path)
    # The popular ones first, so that a block has vectors of like weight.
    users, films = (torch.bincount(each).argsort(descending=True).argsort()[each] for each in (users, films))
    by_user, by_film = torch.stack([users, films]), torch.stack([films, users])
    shape = (int(users.max()) + 1, int(films.max()) + 1)
    ones = torch.ones_like(stars)

    def sparse(places: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).to_sparse_csr()

    return _Table(
        sparse(by_user, stars, shape),
        sparse(by_user, ones, shape),
        (sparse(by_film, stars, shape[::-1]), sparse(by_film, ones, shape[::-1])),
        users,
        films,
        (torch.bincount(users).float(), torch.bincount(films).float()),
    )


def _solved(stars: Tensor, known: Tensor, counts: Tensor, factors: Tensor) -> Tensor:
    """The vectors of the rows that fit best to those of the columns."""
    squares = (factors.unsqueeze(2) * factors.unsqueeze(1)).flatten(1)
    normal = (known @ squares).view(-1, _RANK, _RANK)
    normal += (_WEIGHT * counts).view(-1, 1, 1) * torch.eye(_RANK)
    solved: Tensor = torch.linalg.solve(normal, stars @ factors)
    return solved
