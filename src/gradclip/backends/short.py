"""The 2-norm of a few float32 arrays, by rows too short to be rounded one way.

The processor adds a row in a dozen of sums at once, and these in pairs, so that each is
rounded a few times only, by less than a unit of a float32 norm, and rows that differ
are rounded in different ways. Longer rows have to be summed again in a sample, which
takes longer than all of this where the cache holds the arrays, as do float64 copies.
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
SMALL = 4096
"""Elements up to which arrays are joined: a call each would cost more than a copy."""
JOINED = 1 << 13
"""Elements in all that are joined: from 10,000 on, BLAS starts threads for a `dot`.

Where those of torch keep the cores busy while they wait, it may take milliseconds.
"""
SHARE = 1 / 8
"""The part of the whole that one row may be; what it is wrong by is not more of it."""
CERTAIN = 1.2e-7
"""How far a sum of squares of constants may be off: one unit of a float32 norm."""


def fits_short(sizes: Sequence[int]) -> bool:
    """Return whether arrays of these sizes are few and small enough, and safe here."""
    if len(sizes) > FEW or (count := sum(sizes)) > MOST:
        return False
    joined = [n if n <= SMALL else n % SHORT_ROW for n in sizes]
    if count > JOINED and sum(joined) > JOINED:
        return False
    return adds_evenly()


def short_total(arrays: Sequence[Vector], sizes: Sequence[int]) -> float | None:
    """Return the 2-norm of contiguous arrays, or None where it is in doubt."""
    matrices, rest = [], []
    for x, size in zip(arrays, sizes, strict=True):
        if size <= SMALL:
            rest.append(x.ravel())
        elif left := size % SHORT_ROW:
            flat = x.ravel()
            matrices.append(flat[:-left].reshape(-1, SHORT_ROW))
            rest.append(flat[-left:])
        else:
            matrices.append(x.reshape(-1, SHORT_ROW))
    square, sure = _by_rows(matrices) if matrices else (0.0, True)
    if rest:
        wide = np.concatenate(rest, dtype=np.float64)
        # Nobody sees in float32 that `dot` adds one by one.
        square += float(wide.dot(wide))
    # Squares in float32 may have over- or underflowed on the way.
    fine = sure and 1e-20 < square < math.inf
    return math.sqrt(square) if fine else None


def _by_rows(matrices: Sequence[Vector]) -> tuple[float, bool]:
    """Return the sum of squares of rows, and whether it can be trusted."""
    # Squares may overflow, which the total shows.
    with np.errstate(all="ignore"):
        parts = list(map(np.vecdot, matrices, matrices))
    # Rows that are all alike are rounded alike, and so are those of a constant.
    alike = any(x[0] == x[len(x) // 2] == x[-1] != 0 for x in parts)
    sums = np.concatenate(parts, dtype=np.float64)
    square = float(sums.sum())
    return square, not alike and float(sums.max()) <= SHARE * square


@cache
def adds_evenly() -> bool:
    """Return whether NumPy's rows can be trusted: its BLAS may add one by one."""
    values = np.linspace(1, 2, 200, dtype=np.float32)
    rows = np.repeat(values, SHORT_ROW).reshape(-1, SHORT_ROW)
    exact = SHORT_ROW * np.square(values, dtype=np.float64)
    return bool((np.abs(np.vecdot(rows, rows) / exact - 1) < CERTAIN).all())
