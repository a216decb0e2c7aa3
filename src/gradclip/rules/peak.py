"""AdaClip: elements beyond the usual largest one of their tensor are brought below."""

import math
from dataclasses import dataclass
from typing import Any

from gradclip.rules.averages import weight_of
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, check
from gradclip.rules.keeping import usable


@dataclass(frozen=True)
class Peak(Rule):
    r"""Rescale elements beyond the usual largest one of their tensor (AdaClip).

    $g_i \leftarrow g_i \cdot \hat m_t / \max_j |g_j|$ where $|g_i| > \hat m_t$, with
    $m_t = \theta m_{t-1} + (1 - \theta) \max_j |g_j|$ and
    $\hat m_t = m_t / (1 - \theta^t)$

    The elements of a spike keep their order; the others are left as they are. The new
    largest element is part of the average that it is compared with.

    Args:
        decay: $\theta$, how much of the average is kept at each step, in (0, 1).
        over: Only `"element"`.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a decay outside (0, 1).

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Peak(decay=0.9))
        >>> for g in ([1.0, 0.5], [1.0, 0.5], [40.0, 0.5]):
        ...     print(clipper.clip(np.array(g))[0].round(3).tolist())
        [1.0, 0.5]
        [1.0, 0.5]
        [15.391, 0.5]

    Reference:
        Huang et al.: Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam.
        arXiv 2502.17055, 2025.
    """

    decay: float = 0.999
    over: Scope = "element"

    scopes = ("element",)
    by_part = True
    stateful = True

    def __post_init__(self) -> None:
        """Check the decay."""
        super().__post_init__()
        check(self, "decay", ABOVE_ZERO, 1 - 2**-53, "the decay lies in (0, 1).")

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        zero = xp.sum(xp.zeros_like(norm))
        return {"mean": zero, "count": zero + 0}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of each element, and the average with the largest in it."""
        xp, n, mean, count = seen.xp, seen.norm, state["mean"], state["count"]
        top, count = seen.top, count + 1
        known = usable(top)
        moved = mean + (1 - self.decay) * (top - mean)
        most = moved / weight_of(count, self.decay, xp)
        limit = xp.where(n > most, n * (most / xp.where(known, top, 1.0)), most)
        # Beside a NaN there is no largest element, and nothing to hold the others to.
        limit = xp.where(known, limit, math.inf)
        updated = {
            "mean": xp.where(known, moved, mean),
            "count": xp.where(known, count, state["count"]),
        }
        return limit, updated


AdaClip = Peak
