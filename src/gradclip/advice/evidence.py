"""What norms say by themselves: how they are spread, where they jump, how they drift.

Plain statistics on arrays, without an opinion about limits. Everything is repeatable:
random numbers start from a fixed seed.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gradclip.record import Floats

NORMAL_MAD = 1.4826
"""The standard deviation of normal numbers is this many median deviations."""
SPIKE = 6.0
WIDTH = 50
STRIDE = 10
"""Medians of the steps on one side are taken at every tenth: a million has many."""
RESAMPLES = 300
BINS = 2000
CENTRAL = (0.025, 0.975)
LEAST = 10
"""Fewer norms than this are no level of their own."""
GIVEN_BACK = 0.15
"""A loss has to rise by this part of what it had fallen, or it only wanders."""
WANDERS = 6
"""A rise is at least so many times what neighbouring twentieths usually differ by."""
ALIKE = 2
"""Medians that differ by a factor above this are those of different norms."""
FEWEST_TO_SPLIT = 30
"""A log that is worth fewer independent norms than this shows no change of level."""


def transient_length(norm: Floats) -> int:
    r"""Return how many norms at the start belong to a phase of their own.

    They end where the level of $\log \lVert g \rVert$ changes in the first fifth, by a
    factor above 1.5. If the largest change is another, only what precedes it is looked
    at, in the same way.

    Args:
        norm: Finite norms above 0, in order.

    Returns:
        The number of norms before the cut; 0 where there is no such phase.

    Example:
        >>> import numpy as np
        >>> transient_length(np.array([9.0] * 12 + [1.0, 1.1, 0.9, 1.0] * 30))
        12
    """
    logs, end = _logs(norm), norm.size
    while cut := _largest_change(logs[:end]):
        if cut < norm.size // 5 and _is_step(logs[:end], cut):
            return cut
        end = cut
    return 0


def level_change(norm: Floats) -> int:
    r"""Return after how many norms their level changes most.

    Args:
        norm: Finite norms above 0, in order.

    Returns:
        The number of norms before the change; 0 where no cut beats chance, the levels
        differ by a factor of at most 1.5, or a steady drift explains more.

    Example:
        >>> import numpy as np
        >>> level_change(np.array([1.0, 1.1, 0.9, 1.0] * 30 + [2.0, 2.2, 1.8] * 40))
        120
        >>> level_change(np.linspace(1.0, 9.0, 500))
        0
    """
    logs = _logs(norm)
    cut = _largest_change(logs)
    return cut if cut and _is_step(logs, cut) else 0


def _logs(norm: Floats) -> Floats:
    """Return logarithms in which one norm of 1e7 is no level of its own."""
    if not norm.size:
        return norm.copy()
    logs = np.log(norm)
    return np.clip(logs, *np.quantile(logs, [0.005, 0.995]))


def _largest_change(logs: Floats) -> int:
    """Return the cut that explains most of the variance; 0 where chance explains it."""
    size = logs.size
    if size < 50:
        return 0
    cut = np.arange(LEAST, size - LEAST + 1)
    rest = logs - logs.mean()
    gain = np.cumsum(rest)[cut - 1] ** 2 * size / (cut * (size - cut))
    best, spread = int(np.argmax(gain)), float(rest @ rest)
    place = int(cut[best])
    # A short part does not tell, and one in which the level changes again tells wrong.
    parts = [x for x in (logs[:place], logs[place:]) if x.size >= size // 5]
    worth = size / min(map(_repeats, parts))
    # As few as these lie on two levels by chance, however their memory is estimated.
    if worth < FEWEST_TO_SPLIT:
        return 0
    # Schwarz's criterion: the place and the height of a cut cost log(size) each. Of
    # noise, the best of all cuts passes it in few logs, and the fewer the longer.
    certain = spread - gain[best] < spread * worth ** (-2 / worth)
    return place if certain else 0


def _repeats(logs: Floats) -> float:
    """Return how many steps tell as much as one, since each resembles the one before.

    Of noise with a memory, cuts explain more than of noise without: a log of 2000
    steps in which 0.9 of a deviation stays has no more than 105 of them to tell.
    """
    rest = logs - logs.mean()
    spread = float(rest @ rest)
    stays = float(rest[1:] @ rest[:-1]) / spread if spread > 0 else 0.0
    stays = min(max(stays, 0.0), 0.99)
    return (1 + stays) / (1 - stays)


def _is_step(logs: Floats, cut: int) -> bool:
    """Return whether levels differ at a cut, and are not two halves of a slope."""
    size, before, after = logs.size, logs[:cut], logs[cut:]
    # A few spikes in a short part move its mean, and not its median.
    if abs(np.median(before) - np.median(after)) <= math.log(1.5):
        return False
    place = np.arange(size) - (size - 1) / 2
    slope = (place @ logs) ** 2 / (place @ place)
    step = cut * (size - cut) / size * (before.mean() - after.mean()) ** 2
    return bool(step > slope)


def spike_scores(norm: Floats) -> Floats:
    r"""Return how far each norm stands out from those around it.

    $z_t = (\log \lVert g_t \rVert - m_t) / \sigma$ with $m_t$ the largest median
    around, before or after it, and $\sigma$ from the median deviation of all steps.

    Args:
        norm: Finite norms above 0, in order.

    Returns:
        The robust z-scores.

    Example:
        >>> import numpy as np
        >>> scores = spike_scores(np.array([1.0, 1.1, 0.9, 1.0, 50.0, 1.1, 1.0]))
        >>> int(scores.argmax()), bool(scores.max() > 6)
        (4, True)
    """
    if not norm.size:
        return norm.copy()
    logs = np.log(norm)
    around = running_median(logs)
    deviation = NORMAL_MAD * float(np.median(np.abs(logs - around)))
    # Where the level steps, ordinary norms stand above what lies between two levels.
    level = np.maximum(around, higher_side(logs))
    # Logs with two or three digits have a median deviation of 0.
    return (logs - level) / max(deviation, 0.02)


def running_median(values: Floats) -> Floats:
    """Return the median around each value: of blocks, with straight lines between."""
    blocks = values.size // WIDTH
    if blocks < 3:
        return np.full(values.shape, np.median(values))
    whole = values[: blocks * WIDTH].reshape(blocks, WIDTH)
    centres = np.arange(blocks) * WIDTH + (WIDTH - 1) / 2
    return np.interp(np.arange(values.size), centres, np.median(whole, axis=1))


def higher_side(values: Floats) -> Floats:
    """Return the larger of the medians before and after each value, to some steps."""
    if values.size < 3 * WIDTH:
        return np.full(values.shape, -math.inf)
    # Of a burst that fills a block, those beside it still tell.
    width = 2 * WIDTH
    medians = np.median(sliding_window_view(values, width)[::STRIDE], axis=1)
    place, last = np.arange(values.size), medians.size - 1
    before = medians[np.clip((place - width) // STRIDE, 0, last)]
    after = medians[np.minimum(place // STRIDE + 1, last)]
    return np.maximum(before, after)


def quantile_intervals(
    norm: Floats, shares: Sequence[float]
) -> list[tuple[float, float, float]]:
    """Return quantiles, each with the interval that it lies in with about 95 %.

    Neighbouring steps resemble each other, so that whole blocks of them are drawn, the
    longer the more they do. In a log of less than ten such blocks it is less.

    Args:
        norm: Finite norms, in order.
        shares: Between 0 and 1.

    Returns:
        For each share the quantile and the ends of its interval.

    Example:
        >>> import numpy as np
        >>> norms = np.random.default_rng(0).lognormal(size=500)
        >>> [round(x, 2) for x in quantile_intervals(norms, [0.5])[0]]
        [0.95, 0.82, 1.08]
    """
    wanted = np.quantile(norm, shares)
    edges = np.unique(np.quantile(norm, np.linspace(0, 1, BINS)))
    # Counts between fixed edges make 300 resamples of a million steps one product.
    counts = _block_counts(norm, edges)
    rng = np.random.default_rng(0)
    blocks = len(counts)
    drawn = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES)
    levels = np.cumsum(drawn @ counts, axis=1, dtype=np.float64)
    levels /= levels[:, -1:]
    # A few blocks tell little of how much they differ: the t-distribution's part.
    wider = 1 + 1.7 / max(blocks - 1, 1)
    ends = []
    for share, value in zip(shares, wanted, strict=True):
        found = edges[np.minimum((levels < share - 1e-12).sum(axis=1), edges.size - 1)]
        # In logarithms, in which no ratio overflows.
        aside = np.quantile(np.log(found), CENTRAL) - math.log(value)
        with np.errstate(over="ignore"):
            low, high = np.exp(math.log(value) + wider * aside)
        ends.append((float(value), min(float(low), value), max(float(high), value)))
    return ends


def _block_counts(norm: Floats, edges: Floats) -> Floats:
    """Count the norms of each block between the edges."""
    size = norm.size
    memory = _repeats(np.log(norm)) ** (2 / 3)
    length = min(math.ceil(size ** (1 / 3) * memory), max(size // 10, 1))
    length = max(length, math.ceil(size / 1000))
    blocks = math.ceil(norm.size / length)
    which = np.arange(norm.size) // length
    bins = np.searchsorted(edges, norm)
    flat = np.bincount(which * edges.size + bins, minlength=blocks * edges.size)
    return flat.reshape(blocks, edges.size).astype(np.float64)


def drift_factor(norm: Floats) -> float:
    """Return how many times larger the last fifth of the norms is than the first.

    Args:
        norm: Finite norms above 0, in order.

    Returns:
        The ratio of the medians; 1 where there are fewer than 50.

    Example:
        >>> import numpy as np
        >>> round(drift_factor(np.linspace(1.0, 9.0, 500)), 2)
        4.58
    """
    fifth = norm.size // 5
    if fifth < 10:
        return 1.0
    return float(np.median(norm[-fifth:]) / np.median(norm[:fifth]))


def same_level(*medians: float) -> bool:
    """Return whether medians may be those of the same norms.

    Example:
        >>> same_level(1.0, 1.5, 2.0), same_level(1.0, 3.0)
        (True, False)
    """
    return max(medians) <= ALIKE * min(medians)


def tail_index(norm: Floats) -> float:
    r"""Return Hill's estimate of the tail: how fast large norms become rare.

    $P(\lVert g \rVert > x) \sim x^{-\alpha}$ with $1/\alpha$ the mean of
    $\log(x_i / x_k)$ over the largest twentieth. Numbers with an index of 2 or below
    have no variance; `tail_spread` says how sure that is.

    Args:
        norm: Finite norms above 0.

    Returns:
        The index, infinity for a tail without spread, NaN for fewer than 100 norms.

    Example:
        >>> import numpy as np
        >>> norms = np.random.default_rng(0).pareto(1.5, size=20_000) + 1
        >>> round(tail_index(norms), 1)
        1.5

    Reference:
        Hill: A simple general approach to inference about the tail of a distribution.
        Annals of Statistics 3(5), 1975.
    """
    top = norm.size // 20
    if top < 5:
        return math.nan
    largest = np.sort(norm)[-top - 1 :]
    mean = float(np.mean(np.log(largest[1:] / largest[0])))
    return 1 / mean if mean > 0 else math.inf


def tail_spread(norm: Floats) -> float:
    """Return twice the standard error of `tail_index`.

    Args:
        norm: Finite norms above 0.

    Example:
        >>> import numpy as np
        >>> norms = np.random.default_rng(0).pareto(1.5, size=20_000) + 1
        >>> round(tail_spread(norms), 2)
        0.1
    """
    return 2 * tail_index(norm) / math.sqrt(max(norm.size // 20, 1))


def lost_from(loss: Floats) -> int:
    """Return from which step on a run was lost: its loss rose, and never came back.

    A run counts as lost if the median loss of its last tenth is more than half above
    where it began, and more than the noise explains, or not finite. It began at its
    first loss, or at the median of the first three if that is above it. The rise to
    half above that is where it leaves the fewest losses on the wrong side; it began
    behind the last loss before it that was less than a tenth above.

    Args:
        loss: The loss at each step; nothing is said if most are NaN.

    Returns:
        The index, or the number of steps for a run that was not lost.

    Example:
        >>> import numpy as np
        >>> lost_from(np.array([4.8, 3.9, 3.8, 15.0, 20.0, 12, 11, 12, 10, 10]))
        3
    """
    size, known = loss.size, np.flatnonzero(~np.isnan(loss))
    if size < 10 or known.size < size / 2:
        return size
    first = _first(loss[known])
    end = float(np.median(np.nan_to_num(loss[-(size // 10) :], nan=math.inf)))
    # Three losses may be low by chance, and by how much those behind them tell.
    if not 0 < first * _clearly(loss[: max(size // 10, LEAST)]) < end:
        return size
    return _left(loss, _risen(loss, 1.5 * first), first)


def relapsed_from(loss: Floats) -> int:
    """Return from which step on a loss was high again that had fallen.

    It fell by a third or more from where it began to its lowest median of a tenth, and
    the median of the last tenth is more than half above that, both by more than the
    noise explains. It rose at once, and not slowly, as that of a value network may; and
    by more than a part of what it had fallen, as a loss near 0 wanders.

    Args:
        loss: The loss at each step; nothing is said if most are not known, or if one
            is not above 0.

    Returns:
        The index, or the number of steps where there is no such rise.

    Example:
        >>> import numpy as np
        >>> loss = np.concatenate([np.linspace(10.8, 3.0, 700), np.full(300, 5.5)])
        >>> relapsed_from(loss)
        700
    """
    known = np.flatnonzero(np.isfinite(loss))
    seen = loss[known]
    if known.size < max(10 * LEAST, loss.size / 2) or seen.min() <= 0:
        return loss.size
    logs, tenth = np.log(seen), known.size // 10
    medians = np.median(logs[: 9 * tenth].reshape(9, tenth), axis=1)
    low, end = float(medians.min()), float(np.median(logs[-tenth:]))
    if not _is_return(seen, low, end):
        return loss.size
    start = tenth * int(np.argmin(medians))
    risen = start + _risen(logs[start:], (low + end) / 2)
    before = float(np.median(logs[max(risen - tenth, 0) : max(risen, 1)]))
    after = float(np.median(logs[risen : risen + tenth]))
    # Of a slow rise, the losses before its middle are hardly below those behind.
    if after - before <= (end - low) / 2:
        return loss.size
    return int(known[_left(seen, risen, math.exp(before))])


def _is_return(loss: Floats, low: float, end: float) -> bool:
    """Return whether a loss had fallen to a logarithm clearly, and clearly rose."""
    first = math.log(_first(loss))
    if min(first, end) - low <= math.log(_clearly(loss)):
        return False
    # Noise that remembers takes the medians of whole parts along.
    part = loss.size // 20
    medians = np.median(np.log(loss[: 20 * part]).reshape(20, part), axis=1)
    if end - low <= WANDERS * float(np.median(np.abs(np.diff(medians)))):
        return False
    # Divided by the largest, losses near 1e308 do not overflow.
    top = max(first, end)
    began, lowest, ended = (math.exp(x - top) for x in (first, low, end))
    return ended - lowest > GIVEN_BACK * (began - lowest)


def _first(loss: Floats) -> float:
    """Return where a loss began; the first one may be a lucky one."""
    return float(max(loss[0], np.median(loss[:3])))


def _clearly(loss: Floats) -> float:
    """Return the factor of a change that counts, and that noise does not explain."""
    return max(1.5, math.exp(min(1.5 * _noise(loss), 300.0)))


def _risen(loss: Floats, high: float) -> int:
    """Return where losses cease to be low: the cut with fewest on the wrong side."""
    # A single loss that is high is noise. A gap, and a loss that became NaN, counts on
    # neither side.
    sides = np.where(np.isnan(loss), 0, np.where(loss > high, 1, -1))
    return int(np.argmin(np.concatenate([[0], np.cumsum(sides)])))


def _left(loss: Floats, risen: int, level: float) -> int:
    """Return where a loss that has risen left its level behind."""
    low = np.flatnonzero(loss[:risen] <= 1.1 * level)
    return int(low[-1]) + 1 if low.size else risen


def dead_from(norm: Floats, loss: Floats) -> int:
    """Return from which step on to the end a run is dead, for ten steps or more.

    A dead step has a norm that is not finite, or a norm and a loss of exactly 0, as
    they are written where NaN is. Runs with sound steps of this kind, as those of GRPO,
    are dead once these last more than three times as long as ever before.

    Args:
        norm: The norm at each step.
        loss: The loss at each step; NaN where not known.

    Returns:
        The index, or the number of steps for a run that is alive.

    Example:
        >>> import numpy as np
        >>> norm = np.array([1.0] * 30 + [np.nan] * 12)
        >>> dead_from(norm, np.zeros(42))
        30
    """
    zero = (norm == 0) & (loss == 0)
    start = _end_block(~np.isfinite(norm) | zero)
    least = max(LEAST, 3 * _longest(zero[:start]) + 1) if zero[start:].any() else LEAST
    return start if norm.size - start >= least else norm.size


def _end_block(found: NDArray[np.bool_]) -> int:
    """Return where the true values begin that a row ends with."""
    others = np.flatnonzero(~found)
    return int(others[-1]) + 1 if others.size else 0


def _longest(found: NDArray[np.bool_]) -> int:
    """Return how many true values stand beside each other at most."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], found, [False]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _noise(loss: Floats) -> float:
    """Return the standard deviation of the logarithm of single losses."""
    steps = np.diff(np.log(loss[np.isfinite(loss) & (loss > 0)]))
    spread = float(np.median(np.abs(steps))) if steps.size else 0.0
    return NORMAL_MAD * spread / math.sqrt(2)


def stands_still(loss: Floats) -> bool:
    """Return whether a loss is above 0, and its last tenth no lower than its first.

    Args:
        loss: The loss at each step; NaN where not known.

    Returns:
        Whether the median of the last tenth is at most 2 % below that of the first.

    Example:
        >>> import numpy as np
        >>> stands_still(np.full(100, 2.3)), stands_still(np.linspace(2.3, 1.0, 100))
        (True, False)
    """
    before, after = ends(loss)
    return before > 0 and after > 0.98 * before


def ends(loss: Floats) -> tuple[float, float]:
    """Return the median of the first tenth and of the last; NaN where not known.

    Example:
        >>> import numpy as np
        >>> ends(np.repeat([3.0, 2.0, 1.0], 20)), ends(np.ones(20))
        ((3.0, 1.0), (nan, nan))
    """
    known = loss[np.isfinite(loss)]
    tenth = known.size // 10
    if tenth < 3 or known.size < loss.size / 2:
        return math.nan, math.nan
    return float(np.median(known[:tenth])), float(np.median(known[-tenth:]))


def pile_up(norm: Floats) -> float:
    """Return the share of norms that sit at the largest one, within a thousandth.

    Norms after clipping do: none exceeds the limit, and every clipped one is at it.

    Example:
        >>> import numpy as np
        >>> pile_up(np.array([1.0, 0.3, 0.9999996, 1.0]))
        0.75
    """
    return float(np.mean(norm >= norm.max() * (1 - 1e-3))) if norm.size else 0.0


def share_above(ordered: Floats, limit: float | Floats) -> float | NDArray[np.float64]:
    """Return the share of sorted norms above a limit, or above each of several."""
    above = ordered.size - np.searchsorted(ordered, limit, side="right")
    return above / max(ordered.size, 1)
