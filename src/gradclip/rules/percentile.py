"""AutoClip: a limit that is a percentile of the norms so far."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import check
from gradclip.rules.keeping import usable
from gradclip.rules.window import counted, empty_window, places_in


@dataclass(frozen=True)
class Percentile(Rule):
    r"""Limit each norm to a percentile of those so far, its own included (AutoClip).

    $c_t = \operatorname{percentile}_q(\lVert g_{t-w+1} \rVert, …, \lVert g_t \rVert)$

    Args:
        q: The percentile, from 0 to 100, interpolated as `numpy.percentile` does.
        window: How many norms are remembered, at least 1; not those that are 0, NaN or
            infinite. None remembers all
            of them, as the paper does, for a sort that grows with the run.
        over: `"all"` or each `"tensor"`.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a percentile outside 0…100 or a window below 1.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Percentile(q=50))
        >>> [float(clipper.clip(np.array([n]))[1].limit) for n in (1.0, 3.0, 100.0)]
        [1.0, 2.0, 3.0]

    Reference:
        Seetharaman, Wichern, Pardo, Le Roux: AutoClip: adaptive gradient clipping for
        source separation networks. arXiv 2007.14469, 2020.
    """

    q: float = 10.0
    window: int | None = 1000
    over: Scope = "all"

    stateful = True

    def __post_init__(self) -> None:
        """Check the percentile and the window."""
        super().__post_init__()
        check(self, "q", 0.0, 100.0, "a percentile lies between 0 and 100.")
        if self.window is not None:
            check(self, "window", 1, sys.maxsize, "at least one norm is remembered.")

    @property
    def kind(self) -> str:
        """The window decides what the memory looks like, too."""
        return f"Percentile(over={self.over!r}, window={self.window!r})"

    @property
    def grows(self) -> bool:
        """Without a window, every norm is kept."""
        return self.window is None

    def init(self, norm: Array, xp: Any) -> State:
        """Return a window without a norm, which may have to grow."""
        return empty_window(norm, 256 if self.window is None else self.window, xp)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the percentile of the norms in memory with the new ones among them."""
        xp, known = seen.xp, usable(seen.norm)
        norms, count = state["norms"], state["count"]
        # The host knows the step, and no more norms have come than steps.
        if self.window is None and seen.step >= norms.shape[0]:
            norms = xp.concat([norms, xp.full_like(norms, math.inf)])
        size = norms.shape[0]
        places = places_in(norms, xp)
        norms = xp.where((places == count % size) & known, seen.norm, norms)
        count = xp.where(known, counted(count, size, xp), count)

        ordered = xp.sort(norms, axis=0)
        last = xp.clip(count, 1.0, float(size)) - 1
        position = last * (self.q / 100)
        low = xp.floor(position)

        def ranked(rank: Array) -> Array:
            return xp.sum(xp.where(places == rank, ordered, 0.0), axis=0)

        below, above = ranked(low), ranked(xp.where(low < last, low + 1, last))
        # Interpolating from infinity (nothing seen yet) would make NaN.
        step = xp.where(xp.isfinite(above), above, 0.0) - xp.where(
            xp.isfinite(below), below, 0.0
        )
        return below + step * (position - low), {"norms": norms, "count": count}


AutoClip = Percentile
