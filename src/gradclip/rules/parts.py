"""The norm of a whole, from the norms of its parts."""

from typing import Any

from gradclip.rules.base import Array
from gradclip.rules.keeping import usable


def norm_of(norms: Array, xp: Any) -> Array:
    """Return the 2-norm of norms, of those that are finite, without overflow."""
    known = usable(norms, xp)
    largest = xp.max(xp.where(known, norms, 0.0))
    unit = xp.where(largest > 0, largest, 1.0)
    return unit * xp.sqrt(xp.sum(xp.where(known, norms / unit, 0.0) ** 2))
