"""What a stale gradient is worth."""

from collections.abc import Callable

#: Weighs a contribution by its staleness, in optimizer steps: from 0, leave it out, to 1, as good as a fresh one.
Discount = Callable[[int], float]


def inverse_discount(staleness: int) -> float:
    """One over the age, ``1 / (1 + staleness)`` (staleness-aware async SGD, Zhang et al. 2016, arXiv 1511.05950).

    Theirs divides the learning rate by a staleness that begins at 1.

    Example::

        >>> [inverse_discount(staleness) for staleness in (0, 1, 3)]
        [1.0, 0.5, 0.25]

    """
    return 1 / (1 + staleness)


def exponential_discount(factor: float = 0.5) -> Discount:
    """The discount ``factor ** staleness``.

    Args:
        factor: What each step leaves of a gradient's worth, in [0, 1].

    Raises:
        ValueError: If the factor is out of range.

    Example::

        >>> discount = exponential_discount(0.5)
        >>> [discount(staleness) for staleness in (0, 1, 3)]
        [1.0, 0.5, 0.125]

    """
    if not 0 <= factor <= 1:
        raise ValueError(f"factor={factor!r} must be in [0, 1]: each step leaves that share of a gradient's worth")
    return lambda staleness: float(factor**staleness)
