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


def geometric(values: Sequence[float]) -> Estimate:
    """Return the geometric mean with the interval of the mean of the logarithms."""
    found = mean([math.log(x) if x > 0 else math.nan for x in values])
    value, low, high = (
        None if x is None else math.exp(x)
        for x in (found["value"], found["low"], found["high"])
    )
    return Estimate(
        value=value,
        low=low,
        high=high,
        seeds=found["seeds"],
        not_finite=found["not_finite"],
    )


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


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Return the mean of the differences, seed by seed."""
    size = min(len(values), len(others))
    return mean(np.subtract(values[:size], others[:size]).tolist())


def within_noise(values: Sequence[float], others: Sequence[float]) -> bool | None:
    """Return whether the differences, seed by seed, may as well be 0.

    None where that cannot be told: one seed, or values that are not finite.
    """
    apart = difference(values, others)
    if apart["low"] is None:
        return None
    return not (positive(apart) or negative(apart))


def above(one: Estimate, other: Estimate) -> bool | None:
    """Return whether an interval lies wholly above another one; None of one seed.

    Shares have intervals even then, which overlap whatever was seen.
    """
    low, high = one["low"], other["high"]
    if min(one["seeds"], other["seeds"]) < 2:
        return None
    return low is not None and high is not None and low > high


def positive(estimate: Estimate) -> bool | None:
    """Return whether an interval lies wholly above 0; None of one seed."""
    if estimate["seeds"] < 2:
        return None
    return estimate["low"] is not None and estimate["low"] > 0


def negative(estimate: Estimate) -> bool | None:
    """Return whether an interval lies wholly below 0; None of one seed."""
    if estimate["seeds"] < 2:
        return None
    return estimate["high"] is not None and estimate["high"] < 0


def includes(estimate: Estimate, number: float) -> bool | None:
    """Return whether a number lies within an interval; None of one seed."""
    low, high = estimate["low"], estimate["high"]
    if estimate["seeds"] < 2:
        return None
    return low is not None and high is not None and low <= number <= high
