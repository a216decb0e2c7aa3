"""The norm of a whole, from the norms of its parts."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gradclip.rules.base import Array
from gradclip.rules.keeping import usable


def norm_of(norms: Array, xp: Any) -> Array:
    """Return the 2-norm of norms, of those that are finite, without overflow."""
    if 0 in norms.shape:
        # A masked optimizer may have no gradients.
        return xp.sum(norms)
    known = usable(norms)
    largest = xp.max(xp.where(known, norms, 0.0))
    unit = xp.where(largest > 0, largest, 1.0)
    return unit * xp.sqrt(xp.sum(xp.where(known, norms / unit, 0.0) ** 2))


def share(limit: Array, norm: Array, total: Array, xp: Any) -> Array:
    """Return what a part may take of the limit of the whole."""
    part = limit * (norm / xp.where(total > 0, total, 1.0))
    # Where the whole stays as it is, no part may be rounded away from what it is.
    part = xp.where((limit == total) | xp.isnan(total), norm, part)
    return xp.where(xp.isinf(limit), limit, part)


def constants(values: ArrayLike, norm: Array, xp: Any) -> Array:
    """Return constants as an array on the device of the norms, in full precision."""
    # A traced array has no device, and needs none.
    device = getattr(norm, "device", None)
    if device is not None and not getattr(norm, "committed", True):
        # To name it would bind an array of JAX to it, and keep it off any mesh.
        device = None
    # Torch would make float32 of a list.
    return xp.asarray(np.asarray(values), device=device)
