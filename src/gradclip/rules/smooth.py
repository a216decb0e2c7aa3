"""Smooth clipping: a limit that norms are bent towards."""

from dataclasses import dataclass
from typing import Literal

from gradclip.rules.base import Array, Measured, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check, choose
from gradclip.rules.limits import Limit, Limited, check_limit, limit_at

TINY = 1e-9
"""What part of its limit a norm is too small for to be bent, also in float64."""


@dataclass(frozen=True)
class Smooth(Limited):
    r"""Bend norms towards a limit that none of them reaches, instead of cutting them.

    $g \leftarrow g \cdot c / (c + \lVert g \rVert)$, or
    $g \leftarrow g \cdot c \tanh(\lVert g \rVert / c) / \lVert g \rVert$, or
    $g \leftarrow g / \sqrt{1 + \lVert g \rVert^2 / c^2}$

    Every norm is made smaller, small ones by little: `info.limit` is the norm that this
    norm is brought to. There is no step at which it starts, so that the clip rate says
    nothing here.

    Args:
        limit: $c$, the bound of the norms afterwards, in the unit of the gradient norm,
            above 0; as a number it is finite. A number, a 0-d array, or a function of
            the step that returns one.
        over: As for `Norm`.
        curve: `"ratio"` is the first of the equations, `"tanh"` the second, `"root"`
            the third.
        axis: As for `Norm`.

    Raises:
        TypeError: For a limit that is not a number, a 0-d array or a function.
        ValueError: For a limit that is not above 0 and finite, an unknown scope or
            curve.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> for size in (0.1, 1.0, 1000.0):
        ...     _, info = gc.clip(np.array([size]), gc.Smooth(1.0))
        ...     print(round(float(info.norm_after), 4))
        0.0909
        0.5
        0.999

    Reference:
        Zhang, Jin, Fang, Wang: Improved analysis of clipping algorithms for non-convex
        optimization (whose code uses the ratio). arXiv 2010.02519, 2020.
    """

    limit: Limit
    over: Scope = "all"
    curve: Literal["ratio", "tanh", "root"] = "ratio"
    axis: int = 0

    scopes = ("all", "tensor", "unit", "element", "singular")
    bends = True

    def __post_init__(self) -> None:
        """Check the limit, the scope and the curve."""
        super().__post_init__()
        check_limit(self, "limit")
        if isinstance(self.limit, float | int):
            check(self, "limit", ABOVE_ZERO, LARGEST, "the limit is finite here.")
        choose(self, "curve", ("ratio", "tanh", "root"))

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return what each norm is bent to."""
        xp, n, c = seen.xp, seen.norm, limit_at(seen, self.limit)
        if self.curve == "tanh":
            # An infinite limit, or a norm far below it, would make NaN or 0 of it.
            return xp.where(n / c < TINY, n, c * xp.tanh(n / c)), state
        # c n / (c + n) without a sum or a product that could overflow.
        low, high = xp.where(n < c, n, c), xp.where(n < c, c, n)
        if self.curve == "root":
            return low / xp.hypot(xp.ones_like(low), low / high), state
        return low / (1 + low / high), state
