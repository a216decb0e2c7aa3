"""A window of the last norms: a ring, in which a new one replaces the oldest."""

import math
from typing import Any

from gradclip.rules.base import Array, State


def empty_window(norm: Array, size: int, xp: Any) -> State:
    """Return a window without a norm; infinity marks a place that is still free."""
    places = xp.stack([norm] * size)
    return {"norms": xp.full_like(places, math.inf), "count": xp.zeros_like(norm)}


def places_in(norms: Array, xp: Any) -> Array:
    """Return the number of each place in a window, counted from 0."""
    return xp.cumulative_sum(xp.ones_like(norms), axis=0) - 1


def counted(count: Array, size: int, xp: Any) -> Array:
    """Return the next count, in a ring of that size, whose places it goes round.

    In float32 one more than 2 ** 24 is the same number, and the ring would stand still.
    """
    rounds = size * (2**22 // size)
    return xp.where(count < 2**23, count, count - rounds) + 1


def remembered(norms: Array, count: Array, taken: Array, xp: Any) -> Array:
    """Return a ring of norms with new ones in the place of the oldest."""
    return xp.where(places_in(norms, xp) == count % norms.shape[0], taken, norms)
