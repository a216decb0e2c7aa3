"""Numbers of any library, brought to the host."""

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat
import numpy as np
from numpy.typing import NDArray


def host_array(x: Any) -> NDArray[Any]:
    """Return an array of any library as one of NumPy's, which may share its memory."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        # NumPy has no such type, and torch does not convert it by itself.
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x
    return np.asarray(x)


def to_numpy(values: Sequence[Any]) -> list[NDArray[np.float64]]:
    """Return arrays of any library as NumPy arrays, copied together where they can."""
    try:
        first = values[0]
        xp = array_api_compat.array_namespace(first)
        stacked = xp.stack(list(values))
        stacked = stacked.detach().cpu() if hasattr(stacked, "detach") else stacked
        return list(np.asarray(stacked, np.float64))
    except (TypeError, ValueError, RuntimeError):
        # Shapes may differ where the gradients of a step do.
        return [host_array(x).astype(np.float64) for x in values]


def norm_of_cells(
    cells: NDArray[np.float64], p: float = 2.0, finite: bool = True
) -> float:
    """Return one norm for all cells of a scope.

    A NaN cell is a missing gradient where all others are `finite`.
    """
    if cells.ndim == 0:
        return float(cells)
    known = cells[~np.isnan(cells)]
    if not known.size or (known.size < cells.size and not finite):
        return math.nan
    largest = float(known.max())
    if math.isinf(p) or not 0 < largest < math.inf:
        return largest
    # Divided first, since the square of a norm of 1e200 is infinite.
    return float(largest * np.sum((known / largest) ** p) ** (1 / p))


def smallest(scales: NDArray[np.float64]) -> float:
    """Return the smallest scale of all cells; of no gradients, it is 1."""
    return float(scales.min()) if scales.size else 1.0
