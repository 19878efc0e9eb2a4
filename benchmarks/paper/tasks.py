"""The tasks by name: those of the paper, and two that it lacks."""

from functools import partial
from pathlib import Path

from benchmarks import data
from benchmarks.paper import networks
from benchmarks.paper.factorization import Factorization
from benchmarks.paper.topics import TopicModel
from benchmarks.paper.trials import Task

#: So large that no tensor is cut.
_WHOLE = 1 << 30


def tasks(movielens: Path | None = None) -> dict[str, Task]:
    """All tasks.

    Args:
        movielens: The ratings' file; ``None`` downloads the package that holds it.

    """
    found = [
        # A block is twelve pixels, four pixels, 16 users or films: of less than 40 values a refresh hardly saves bytes.
        Task("mlr_mnist", partial(networks.regression, data.mnist, 0.03), 60, 480),
        Task("mlr_digits", partial(networks.regression, data.digits, 0.5), 60, 160),
        Task("mf", partial(Factorization, movielens, True), 30, 320),
        Task("mf_plain", partial(Factorization, movielens, False), 30, 320),
        # A document. Counts in low precision are other counts.
        Task("lda", TopicModel, 30, _WHOLE, is_refreshed=False),
        Task("cnn_layers", networks.cnn, 40, _WHOLE),
        Task("cnn_shards", networks.cnn, 40, 1024),
        Task("gpt", networks.gpt, 40, 2048),
        # Four users, four films.
        Task("recommender", partial(networks.recommender, movielens), 30, 256),
    ]
    return {task.name: task for task in found}
