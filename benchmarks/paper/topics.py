"""Latent Dirichlet allocation by collapsed Gibbs sampling."""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from benchmarks import data
from benchmarks.paper.training import Training, chance

_TOPICS = 10
#: The Dirichlet priors of a document's topics, and of a topic's words.
_ALPHA, _ETA = 0.1, 0.01
#: Words that are drawn at once, by what the others were before (Newman et al. 2009, AD-LDA): a quarter of them.
_PARTS = 4
#: What word counts are kept times: their distance shall not count. A power of two, so that they stay exact.
_SLIGHT = 2.0**-20


class _Corpus(NamedTuple):
    """Which word stands in which document.

    Attributes:
        starts: The first pair of each document, and behind the last.
        documents: The document of each pair of a document and a word.
        words: Its word.
        pairs: The pair of each token, ascending.
        parts: The documents and the words of the tokens of each part.
        vocabulary: The number of words.
        own_rows: The row of the state that holds the topics of each document.
        weights: What these are kept times; one column.
        pair_rows: The row of the state that holds those of each pair.

    """

    starts: list[int]
    documents: Tensor
    words: Tensor
    pairs: Tensor
    parts: list[tuple[Tensor, Tensor]]
    vocabulary: int
    own_rows: Tensor
    weights: Tensor
    pair_rows: Tensor


class TopicModel(Training):
    """How many of each word's tokens in each document belong to each topic; an iteration draws all of them anew.

    The state is a matrix for each document. Its first row is what the distance is taken of: the counts of the topics of
    the whole document, times the root of its length, so that their squared distance per byte ranks documents as the
    paper does, by the distance of their distributions times their length, bytes growing with the length, too. In the
    other rows, one for each of its words, the counts are kept almost at nothing: they are all there is to know, since
    tokens of one word in one document are interchangeable, but mostly chance.

    Args:
        seed: Of the initial topics and of all draws.

    """

    def __init__(self, seed: int) -> None:
        self.iteration = 0
        self._seed = seed
        corpus = _corpus()
        drawn = torch.randint(_TOPICS, (len(corpus.pairs),), generator=torch.Generator().manual_seed(seed))
        self._counts = torch.zeros(len(corpus.words), _TOPICS)
        _count(self._counts, corpus.pairs, drawn, 1.0)
        self._by_document = torch.zeros(len(corpus.own_rows), _TOPICS).index_add_(0, corpus.documents, self._counts)
        self._by_word = torch.zeros(corpus.vocabulary, _TOPICS).index_add_(0, corpus.words, self._counts)
        self.state = torch.empty(len(corpus.own_rows) + len(corpus.pair_rows), _TOPICS)
        self._keep()

    @override
    def step(self) -> None:
        corpus = _corpus()
        rows, columns = self._counts.nonzero(as_tuple=True)
        topics = columns.repeat_interleave(self._counts[rows, columns].long())
        chances = torch.rand(len(topics), generator=chance(self._seed, self.iteration))
        for part, (documents, words) in enumerate(corpus.parts):
            old = topics[part::_PARTS]
            new = self._drawn(documents, words, old, chances[part::_PARTS])
            for totals, rows in ((self._by_document, documents), (self._by_word, words)):
                _count(totals, rows, old, -1.0)
                _count(totals, rows, new, 1.0)
            topics[part::_PARTS] = new
        _count(self._counts.zero_(), corpus.pairs, topics, 1.0)
        self._keep()
        self.iteration += 1

    def _drawn(self, documents: Tensor, words: Tensor, old: Tensor, chances: Tensor) -> Tensor:
        by_topic = self._by_word.sum(0) + _corpus().vocabulary * _ETA
        own = old.unsqueeze(1)
        less_one = -torch.ones(own.shape)
        shares = self._by_document.index_select(0, documents).scatter_add_(1, own, less_one).add_(_ALPHA)
        shares *= self._by_word.index_select(0, words).scatter_add_(1, own, less_one).add_(_ETA)
        shares /= by_topic
        # The share of the token's own topic still needs its token taken out of that topic's total.
        at_own = shares.gather(1, own) * (by_topic[old] / (by_topic[old] - 1)).unsqueeze(1)
        sums = shares.scatter_(1, own, at_own).cumsum_(1)
        return (sums < (chances * sums[:, -1]).unsqueeze(1)).sum(1).clamp_(max=_TOPICS - 1)

    @override
    def loss(self) -> float:
        """Minus the log-likelihood of words and topics, a token (Griffiths and Steyvers 2004, equations 2 and 3).

        But for a constant, so that it may be negative.
        """
        by_topic, by_document = self._by_word.double(), self._by_document.double()
        words = (by_topic + _ETA).lgamma().sum() - (by_topic.sum(0) + len(by_topic) * _ETA).lgamma().sum()
        likelihood = words + (by_document + _ALPHA).lgamma().sum()
        return -float(likelihood) / len(_corpus().pairs)

    @override
    def checkpoint(self) -> dict[str, Any]:
        return {"state_dict": {f"document {i}": part for i, part in enumerate(self.parameters())}}

    @override
    def parameters(self) -> list[Tensor]:
        return [self.state[start + i : stop + i + 1] for i, (start, stop) in enumerate(pairwise(_corpus().starts))]

    @override
    def recovered(self) -> None:
        corpus = _corpus()
        torch.div(self.state[corpus.pair_rows], _SLIGHT, out=self._counts)
        self._by_document.zero_().index_add_(0, corpus.documents, self._counts)
        self._by_word.zero_().index_add_(0, corpus.words, self._counts)

    def _keep(self) -> None:
        corpus = _corpus()
        self.state[corpus.pair_rows] = self._counts * _SLIGHT
        self.state[corpus.own_rows] = self._by_document * corpus.weights


def _count(totals: Tensor, rows: Tensor, topics: Tensor, worth: float) -> None:
    totals.view(-1).scatter_add_(0, rows * _TOPICS + topics, torch.full((len(rows),), worth))


@lru_cache
def _corpus() -> _Corpus:
    documents = data.reuters()
    pairs = [(d, word, count) for d, counts in enumerate(documents) for word, count in sorted(counts.items())]
    table = torch.tensor(pairs)
    starts = [0, *torch.tensor([len(counts) for counts in documents]).cumsum(0).tolist()]
    documents_of, words_of = table[:, 0].contiguous(), table[:, 1].contiguous()
    tokens = torch.arange(len(table)).repeat_interleave(table[:, 2])
    parts = [(documents_of[tokens[i::_PARTS]], words_of[tokens[i::_PARTS]]) for i in range(_PARTS)]
    own_rows = torch.tensor(starts[:-1]) + torch.arange(len(documents))
    pair_rows = torch.arange(len(table)) + documents_of + 1
    weights = torch.tensor([[float(sum(counts.values()))] for counts in documents]).sqrt()
    return _Corpus(starts, documents_of, words_of, tokens, parts, int(words_of.max()) + 1, own_rows, weights, pair_rows)
