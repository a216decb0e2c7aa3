"""Quantile tracking: a limit that steps towards a quantile, without a window."""

import math
from dataclasses import dataclass
from typing import Any

from gradclip.rules.averages import added
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check
from gradclip.rules.keeping import held, usable


@dataclass(frozen=True)
class Quantile(Rule):
    r"""Move the limit by a factor a step towards a percentile of the norms.

    $c_{t+1} = c_t \exp(-\eta (b_t - q / 100))$ with $b_t = 1$ where
    $\lVert g_t \rVert \le c_t$, else 0

    Two numbers are remembered, whatever the length of the past, and a spike moves the
    limit no further than any other norm above it. `Percentile` is exact, and sorts.

    Args:
        q: The percentile that is followed, from 0 to 100.
        rate: $\eta$, how far the limit may move at a step: by a factor of at most
            $e^\eta$; above 0, up to 80.
        over: `"all"` or each `"tensor"`.
        start: The first limit, in the unit of the gradient norm, above 0 and finite.
            None takes the first norm, so that a multiple of the loss has the same
            scales.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Quantile(q=50.0))
        >>> norms = [1.0, 2.0, 2.0, 1e6, 2.0]
        >>> [round(float(clipper.clip(np.array([n]))[1].limit), 3) for n in norms]
        [1.0, 0.905, 1.0, 1.105, 1.221]

    Reference:
        Andrew, Thakkar, McMahan, Ramaswamy: Differentially private learning with
        adaptive clipping. arXiv 1905.03871, 2021. There $b$ is the share of a batch of
        samples, with noise added.
    """

    q: float = 50.0
    rate: float = 0.2
    over: Scope = "all"
    start: float | None = None

    stateful = True

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        check(self, "q", 0.0, 100.0, "a percentile lies between 0 and 100.")
        # Beyond that, the factor of one step would be infinite in float32.
        check(self, "rate", ABOVE_ZERO, 80.0, "it lies above 0, up to 80.")
        if self.start is not None:
            bounds = "the first limit is a finite number above 0."
            check(self, "start", ABOVE_ZERO, LARGEST, bounds)

    def init(self, norm: Array, xp: Any) -> State:
        """Return the first limit; 0 stands for one that the first norm will give."""
        zeros = xp.zeros_like(norm)
        return {"limit": zeros + (self.start or 0.0), "rest": zeros}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit, and where it has moved to."""
        xp, n = seen.xp, seen.norm
        limit = xp.where(state["limit"] > 0, state["limit"], n)
        share = self.q / 100
        down, up = (math.expm1(self.rate * x) for x in (share - 1, share))
        # As a sum, since in float32 the rounding of a factor near 1 adds up.
        change = xp.where(n <= limit, limit * down, limit * up)
        moved, rest = added(limit, state["rest"], change)
        return limit, held({"limit": moved, "rest": rest}, state, usable(n), xp)
