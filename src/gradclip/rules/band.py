"""Bands: norms are held from below as well as from above."""

from dataclasses import dataclass
from typing import Any

from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import LARGEST
from gradclip.rules.limits import Limit, check_limit, limit_at, readable


@dataclass(frozen=True)
class Band(Rule):
    r"""Rescale norms below a band up to it, and those above it down; 0 stays 0.

    $g \leftarrow g \cdot \max(l, \min(u, \lVert g \rVert)) / \lVert g \rVert$

    Over each `"element"` it is the coordinate-wise clip from both sides of TailOPT.

    Args:
        low: $l$, the smallest norm let through, in the unit of the gradient norm,
            at least 0: a number, a 0-d array, or a function of the step that returns
            one. 0 holds from above only.
        high: $u$, the largest norm let through, in the unit of the gradient norm, at
            least `low`.
        over: As for `Norm`.
        axis: As for `Norm`.

    Raises:
        TypeError: For a limit that is not a number, a 0-d array or a function.
        ValueError: For a limit out of range, numbers in the wrong order, or an unknown
            scope.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, _ = gc.clip(np.array([-9.0, 0.5, 0.01, 0.0]), gc.Band(0.1, 1.0))
        >>> grads.tolist()
        [-1.0, 0.5, 0.1, 0.0]

    Reference:
        Lee, Zaheer, Li: Efficient distributed optimization under heavy-tailed noise
        (Bi2Clip). arXiv 2502.04164, 2025.
    """

    low: Limit
    high: Limit
    over: Scope = "element"
    axis: int = 0

    scopes = ("all", "tensor", "unit", "element")
    stretches = True

    def __post_init__(self) -> None:
        """Check the scope and both limits."""
        super().__post_init__()
        check_band(self)

    @property
    def stateful(self) -> bool:
        """A schedule needs the step, so that something has to count the steps."""
        return callable(self.low) or callable(self.high)

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the norm within the band."""
        return within(seen, limit_at(seen, self.low), limit_at(seen, self.high)), state


def within(seen: Measured, low: Array, high: Array) -> Array:
    """Return the norms, none below `low` and none above `high`."""
    raised = seen.xp.where(seen.norm < low, low, seen.norm)
    return seen.xp.where(raised > high, high, raised)


def check_band(rule: Any) -> None:
    """Refuse a band that is none."""
    check_limit(rule, "high")
    low, high = readable(rule, "low"), readable(rule, "high")
    top = LARGEST if high is None else min(high, LARGEST)
    if low is not None and not 0 <= low <= top:
        raise ValueError(
            f"{type(rule).__name__}(low={rule.low!r}, high={rule.high!r}): "
            "it lies between 0 and high."
        )
