"""A band that moves with the average of the norms: from below as well as from above."""

import sys
from dataclasses import dataclass
from typing import Any

from gradclip.rules.band import check_band, within
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import check
from gradclip.rules.keeping import held, usable
from gradclip.rules.limits import Limit, limit_at


@dataclass(frozen=True)
class MovingBand(Rule):
    r"""Keep each norm within a band around its own moving average (AGGC).

    $g \leftarrow g \cdot \max(l S_{t-1}, \min(u S_{t-1}, \lVert g \rVert)) /
    \lVert g \rVert$, and $S_t = \beta S_{t-1} + (1 - \beta) \lVert g \rVert$ of
    the norm let through

    The paper's groups are the modules of one function in all layers, such as
    `by_name({"*.q_proj.*": MovingBand(0.9, 1.1, over="all"), …})`. $S$ starts at the
    first norm; the released code starts it at 0, and so holds the first steps down.

    Args:
        low: $l$, the smallest multiple of the average let through, at least 0: a number
            or a function of the step. 0 holds from above only.
        high: $u$, the largest multiple, likewise, and above 0.
        decay: $\beta$, how much of the average is kept at each step, in [0, 1].
        over: Each `"tensor"`, or `"all"` of a group.
        warmup: How many norms are watched first, at least 1.

    Raises:
        TypeError: For a limit that is not a number, a 0-d array or a function.
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.MovingBand(0.5, 2.0, over="all"))
        >>> norms = [1.0, 1.2, 50.0, 0.01]
        >>> [round(float(clipper.clip(np.array([n]))[1].norm_after), 3) for n in norms]
        [1.0, 1.2, 2.02, 0.53]

    Reference:
        Li, Wu, Chang: AGGC: adaptive group gradient clipping for stabilizing large
        language model training. arXiv 2601.11864, 2026.
    """

    low: Limit
    high: Limit
    decay: float = 0.95
    over: Scope = "tensor"
    warmup: int = 1

    stretches = True
    stateful = True

    def __post_init__(self) -> None:
        """Check the scope, the band and the numbers."""
        super().__post_init__()
        check_band(self)
        check(self, "decay", 0.0, 1.0, "the decay lies in [0, 1].")
        check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        return {"ema": xp.zeros_like(norm), "count": xp.zeros_like(norm)}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the norm within the band, and the average with it taken in."""
        xp, n, ema, count = seen.xp, seen.norm, state["ema"], state["count"]
        low, high = limit_at(seen, self.low) * ema, limit_at(seen, self.high) * ema
        limit = xp.where(count < self.warmup, n, within(seen, low, high))
        # As a difference: in float32, a sum of two products would drift more.
        moved = ema + (1 - self.decay) * (limit - ema)
        updated = {"ema": xp.where(count == 0, n, moved), "count": count + 1}
        return limit, held(updated, state, usable(n), xp)


AGGC = MovingBand
