"""Intervals of 95 %: Student's t for means, Wilson's for shares."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

CONFIDENCE = 0.95


class Estimate(TypedDict):
    """A number over the seeds; `low` and `high` are None where none can be given."""

    value: float | None
    low: float | None
    high: float | None
    seeds: int
    not_finite: int


def mean(values: Sequence[float]) -> Estimate:
    r"""Return the mean with its interval, $\bar x \pm t_{n-1} s / \sqrt n$.

    Of values that are not all finite there is no mean; they are counted.
    """
    x = np.asarray(values, np.float64)
    lost = int(np.sum(~np.isfinite(x)))
    if lost or not x.size:
        return Estimate(value=None, low=None, high=None, seeds=x.size, not_finite=lost)
    centre = float(x.mean())
    low, high = _around(centre, x) if x.size > 1 else (None, None)
    return Estimate(value=centre, low=low, high=high, seeds=x.size, not_finite=0)


def _around(centre: float, x: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    error = float(x.std(ddof=1)) / math.sqrt(x.size)
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, x.size - 1)) * error
    return centre - width, centre + width


def share(hits: Sequence[bool]) -> Estimate:
    """Return the share of hits with Wilson's interval, which 0 and 1 have as well."""
    from scipy import stats

    count, seeds = int(np.sum(hits)), len(hits)
    interval = stats.binomtest(count, seeds).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(
        value=count / seeds,
        low=float(interval.low),
        high=float(interval.high),
        seeds=seeds,
        not_finite=0,
    )


def within_noise(values: Sequence[float], others: Sequence[float]) -> bool | None:
    """Return whether the differences, seed by seed, may as well be 0.

    None where that cannot be told: one seed, or values that are not finite.
    """
    size = min(len(values), len(others))
    apart = mean(np.subtract(values[:size], others[:size]).tolist())
    if apart["low"] is None or apart["high"] is None:
        return None
    return apart["low"] <= 0 <= apart["high"]


def overlap(one: Estimate, other: Estimate) -> bool | None:
    """Return whether two intervals have a point in common; None without intervals."""
    ends = (one["low"], one["high"], other["low"], other["high"])
    if any(end is None for end in ends):
        return None
    low, high, other_low, other_high = ends
    return low <= other_high and other_low <= high  # type: ignore[operator]
