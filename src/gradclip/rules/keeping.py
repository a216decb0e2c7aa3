"""What enters a memory of norms, and what does not."""

import math
from typing import Any

from gradclip.rules.base import Array, State


def usable(norm: Array) -> Array:
    """Return where a norm says something: one that is 0 or not finite does not.

    A memory of zeros (an expert without tokens so far) would freeze what comes next.
    """
    # NaN compares false; on single numbers, torch's isfinite takes three times as long.
    return (norm > 0) & (norm < math.inf)


def held(new: State, old: State, kept: Array, xp: Any) -> State:
    """Return the new memory, or the old one where the step was dropped."""
    return {
        name: xp.where(kept, x, _grown(old[name], x, xp)) for name, x in new.items()
    }


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


def _grown(old: Array, new: Array, xp: Any) -> Array:
    """Return an array with free places at its end, up to the size of another."""
    if old.shape == new.shape:
        return old
    return xp.concat([old, xp.full_like(new[old.shape[0] :], math.inf)])


def counted(count: Array, size: int, xp: Any) -> Array:
    """Return the next count, in a ring of that size, whose places it goes round.

    In float32 one more than 2 ** 24 is the same number, and the ring would stand still.
    """
    rounds = size * (2**22 // size)
    return xp.where(count < 2**23, count, count - rounds) + 1


def remembered(norms: Array, count: Array, taken: Array, xp: Any) -> Array:
    """Return a ring of norms with new ones in the place of the oldest."""
    places = xp.cumulative_sum(xp.ones_like(norms), axis=0) - 1
    return xp.where(places == count % norms.shape[0], taken, norms)
