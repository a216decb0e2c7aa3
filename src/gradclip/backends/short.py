"""The 2-norm of a few float32 arrays, by rows too short to be rounded one way.

The processor adds a row in a dozen of sums at once, and these in pairs, so that even
squares of one constant are rounded no more than a few times. What longer rows are wrong
by has to be measured, which takes longer than all of this where the cache holds the
arrays; copies in float64 take longer, too.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from gradclip.backends.base import CHUNK
from gradclip.backends.combining import Vector

SHORT_ROW = 128
"""Elements in a row; half as many are rounded no less, and take longer."""
FEW = 64
"""Arrays for which a call each costs less than to join them all."""
MOST = 8 * CHUNK
"""Elements up to which a sample of longer rows takes longer than shorter rows do."""
CERTAIN = 1.2e-7
"""How far a sum of squares of constants may be off: one unit of a float32 norm."""


def fits_short(sizes: Sequence[int]) -> bool:
    """Return whether arrays of these sizes are few and small enough, and safe here."""
    return len(sizes) <= FEW and sum(sizes) <= MOST and adds_evenly()


def short_total(arrays: Sequence[Vector], sizes: Sequence[int]) -> float | None:
    """Return the 2-norm of contiguous arrays, or None where it is in doubt."""
    squares, rest = [], []
    with np.errstate(all="ignore"):
        for x, size in zip(arrays, sizes, strict=True):
            flat, left = x.reshape(-1), size % SHORT_ROW
            if left < size:
                rows = flat[: size - left].reshape(-1, SHORT_ROW)
                squares.append(np.vecdot(rows, rows))
            if left:
                rest.append(flat[size - left :])
        if not (squares or rest):
            return None
        if rest:
            wide = np.concatenate(rest, dtype=np.float64)
            squares.append(np.square(wide, out=wide))
        total = math.sqrt(np.concatenate(squares, dtype=np.float64).sum())
    # Squares in float32 may have over- or underflowed on the way.
    return total if 1e-10 < total < math.inf else None


@cache
def adds_evenly() -> bool:
    """Return whether NumPy's rows can be trusted: its BLAS may add one by one."""
    values = np.linspace(1, 2, 200, dtype=np.float32)
    rows = np.repeat(values, SHORT_ROW).reshape(-1, SHORT_ROW)
    exact = SHORT_ROW * np.square(values, dtype=np.float64)
    return bool((np.abs(np.vecdot(rows, rows) / exact - 1) < CERTAIN).all())
