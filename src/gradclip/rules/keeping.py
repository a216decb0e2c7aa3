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


def _grown(old: Array, new: Array, xp: Any) -> Array:
    """Return an array with free places at its end, up to the size of another."""
    if old.shape == new.shape:
        return old
    return xp.concat([old, xp.full_like(new[old.shape[0] :], math.inf)])
