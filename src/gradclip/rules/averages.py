"""Moving averages that keep their digits in float32, over any number of steps."""

import math
from typing import Any

from gradclip.rules.base import Array


def weight_of(count: Array, decay: float, xp: Any) -> Array:
    """Return 1 - decay ** count, the weight that so many steps have in an average.

    That difference would lose the digits of the first steps in float32.
    """
    return -xp.expm1(count * (math.log(decay) if decay else -math.inf))


def added(total: Array, rest: Array, change: Array) -> tuple[Array, Array]:
    """Return a sum, and the rest that its rounding leaves for the next one (Kahan).

    What grows by a factor is rounded alike at each step: in float32 it was off by 1e-8
    times the number of steps.
    """
    whole = change + rest
    moved = total + whole
    return moved, whole - (moved - total)


def root_moved(root: Array, new: Array, weight: Array | float, xp: Any) -> Array:
    """Return the root of a mean of squares, with a new one at this weight among them.

    The root is kept and not the square, since that of 1e30 is infinite in float32.
    What is added to it is computed, not the sum: in float32 the rounding of a decay
    near 1 would add up over a thousand steps.
    """
    moved = xp.hypot((1 - weight) ** 0.5 * root, weight**0.5 * new)
    both = moved + root
    part = (new + root) / xp.where(both > 0, both, 1.0)
    return root + weight * (new - root) * part
