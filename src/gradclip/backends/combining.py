"""One sum of many float32 sums, without what their rounding had in common.

Float32 rounds some values one way, as it does constants, and a huge element swallows
small ones. Some of the sums are taken in float64 as well: all that are a large part of
the whole, and a sample of the others, which shows what is to be taken away.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[Any]
Exact: TypeAlias = Callable[[Vector], Vector]
"""What returns some of the sums, by their places, in float64."""

LARGE = 2
"""Times the mean from which on a sum is one of the large ones."""
NOISE = 3e-8
"""The standard error of a sum, at most: four are a unit of a float32 norm."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples, less their integers, are spread evenly and never come again."""


def combined(
    squares: Vector, counts: Sequence[int], picks: int, exact: Exact
) -> list[tuple[float, bool]]:
    """Add up each group of `counts` sums of squares, which are in float64.

    Returns:
        The sum of each group, and whether it is in doubt.
    """
    with np.errstate(all="ignore"):
        sums = light = _sums(squares, counts)
        heavy = _heavy(squares, sums, counts, picks)
        if heavy.size:
            squares = squares.copy()
            squares[heavy] = 0
            light = _sums(squares, counts)
        order = _small_first(squares, light, counts)
        if order is None:
            chosen = _places(squares, light, counts, picks)
        else:
            chosen = order[_places(squares[order], light, counts, picks)]
        # Each stands for as large a part of the sum, whatever its own size.
        errors = (squares[chosen] / exact(chosen) - 1).reshape(-1, picks).tolist()
    found = list(map(_without_bias, light, sums, errors))
    if heavy.size:
        squares.fill(0)
        squares[heavy] = exact(heavy)
        known = _sums(squares, counts)
        found = [(x + y, doubt) for (x, doubt), y in zip(found, known, strict=True)]
    return found


def _without_bias(
    light: float, whole: float, errors: list[float]
) -> tuple[float, bool]:
    """Return a sum without the mean error of its sample, and whether that is in doubt.

    What may be an accident is not taken away. The standard error is told by neighbours:
    what changes slowly was chosen evenly. A part that none was chosen from may be
    without the error of all others.
    """
    if not 0 < light < math.inf:
        return light, False
    count = len(errors)
    mean = sum(errors) / count
    steps = sum((b - a) * (b - a) for a, b in pairwise(errors))
    variance = steps / (2 * count * (count - 1)) + (mean / (2 * count)) ** 2
    # Where nothing but accident is seen, most of it is not in the whole sum.
    noise = math.sqrt(variance) * (1.0 if mean * mean > 9 * variance else 0.5)
    if mean * mean > variance:
        light /= 1 + mean - variance / mean
    return light, noise * light > NOISE * whole


def _sums(x: Vector, counts: Sequence[int]) -> list[float]:
    """Return the sum of each group."""
    if len(counts) == 1:
        return [float(x.sum())]
    found: list[float] = np.add.reduceat(x, np.cumsum([0, *counts[:-1]])).tolist()
    return found


def _heavy(
    squares: Vector, sums: list[float], counts: Sequence[int], picks: int
) -> Vector:
    """Return where one is so large a part of its sum that a sample could miss it."""
    least = [x / picks if 0 < x < math.inf else math.nan for x in sums]
    large = squares >= (least[0] if len(counts) == 1 else np.repeat(least, counts))
    return large.nonzero()[0]


def _small_first(
    squares: Vector, sums: list[float], counts: Sequence[int]
) -> Vector | None:
    """Return an order with large ones behind the others of their group, if any is.

    A few rows with a spike each are wrong as no other is, and lie anywhere. Together
    they get their part of a sample; scattered, they would be missed too often.
    """
    least = [LARGE * x / n for x, n in zip(sums, counts, strict=True)]
    large = squares > (least[0] if len(counts) == 1 else np.repeat(least, counts))
    if not large.any():
        return None
    # Of short integers, a stable sort takes one pass.
    groups = np.arange(len(counts), dtype=np.min_scalar_type(2 * len(counts)))
    return (2 * np.repeat(groups, counts) + large).argsort(kind="stable")


@cache
def _steps(picks: int) -> Vector:
    """Return a number in each of equal parts of 0 to 1.

    Equal steps would fall on the same rows of layers that are alike.
    """
    return (np.arange(picks) + np.arange(0.5, picks) * GOLDEN % 1) / picks


def _places(
    squares: Vector, sums: list[float], counts: Sequence[int], picks: int
) -> Vector:
    """Return some of each group: one somewhere in each of equal parts of its sum."""
    steps = _steps(picks)
    if len(counts) == 1:
        # What rounding leaves behind the last sum is the last one's.
        return squares.cumsum()[:-1].searchsorted(steps * sums[0])
    # A group of zeros, or with an infinity, must not shift the places of the others.
    usable = [0 < x < math.inf for x in sums]
    unit = [x if good else math.inf for x, good in zip(sums, usable, strict=True)]
    even = [0 if good else 1 / n for n, good in zip(counts, usable, strict=True)]
    shares = squares / np.repeat(unit, counts)
    shares[np.isnan(shares)] = 0
    shares += np.repeat(even, counts)
    ends = np.cumsum(counts)[:, np.newaxis]
    chosen = shares.cumsum().searchsorted(np.arange(len(counts))[:, np.newaxis] + steps)
    return np.clip(chosen, ends - np.array(counts)[:, np.newaxis], ends - 1).ravel()
