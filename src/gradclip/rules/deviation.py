"""A limit some deviations above the mean of the last norms."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check
from gradclip.rules.keeping import held, usable
from gradclip.rules.window import counted, empty_window, remembered


@dataclass(frozen=True)
class Deviation(Rule):
    r"""Limit each norm to the mean plus some deviations of the norms before it.

    $c_t = \mu + z \sigma$, with the mean and the sample deviation of the last $w$ norms

    `Skip(Deviation())` drops the steps that stand out, and their norms never widen the
    limit of the next ones.

    Args:
        z: How many standard deviations may pass, above 0.
        window: How many norms are remembered, at least 2; not those that are 0, NaN or
            infinite.
        warmup: How many norms are watched before any is clipped, from 2 to `window`.
        over: `"all"` or each `"tensor"`.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Skip(gc.Deviation(z=6.0, window=4, warmup=2)))
        >>> norms = [1.0, 1.2, 90.0, 1.1]
        >>> [float(clipper.clip(np.array([n]))[1].norm_after) for n in norms]
        [1.0, 1.2, 0.0, 1.1]

    Reference:
        OLMo-core, `SkipStepOptimizer` (z = 6, 128 steps), github.com/allenai/OLMo-core.
    """

    z: float = 6.0
    window: int = 128
    warmup: int = 64
    over: Scope = "all"

    stateful = True

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        check(self, "z", ABOVE_ZERO, LARGEST, "the deviations let through are above 0.")
        check(self, "window", 2, sys.maxsize, "a deviation takes two norms or more.")
        check(self, "warmup", 2, self.window, "it lies between 2 and the window.")

    @property
    def kind(self) -> str:
        """The window decides what the memory looks like, too."""
        return f"Deviation(over={self.over!r}, window={self.window!r})"

    def init(self, norm: Array, xp: Any) -> State:
        """Return a window without a norm."""
        return empty_window(norm, self.window, xp)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit from the norms before, and the memory with the new ones."""
        xp, n, norms, count = seen.xp, seen.norm, state["norms"], state["count"]
        there, many = xp.isfinite(norms), xp.clip(count, None, float(self.window))
        # In units of the largest, so that the square of a norm of 1e200 is finite, and
        # as gaps below it, so that the mean of norms that are all alike is exact.
        largest = xp.max(xp.where(there, norms, 0.0), axis=0)
        unit = xp.where(largest > 0, largest, 1.0)
        gaps = xp.where(there, norms / unit - 1, 0.0)
        gap = xp.sum(gaps, axis=0) / xp.clip(many, 1.0, None)
        squares = xp.sum(xp.where(there, gaps - gap, 0.0) ** 2, axis=0)
        spread = self.z * xp.sqrt(squares / xp.clip(many - 1, 1.0, None))
        most = unit * (1 + gap + spread)
        # A norm like all before it must not stand out by its own rounding.
        slack = 1 + 2 * float(xp.finfo(n.dtype).eps)
        limit = xp.where(many < self.warmup, math.inf, most * slack)

        # Without the slack, which would add up where most norms are limited.
        taken = xp.where(n > limit, most, n)
        updated = {
            "norms": remembered(norms, count, taken, xp),
            "count": counted(count, self.window, xp),
        }
        return limit, held(updated, state, usable(n), xp)
