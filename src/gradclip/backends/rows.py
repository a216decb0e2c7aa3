"""Many arrays as rows: sums of squares in float32, and of some in float64 as well.

What is said of arrays here goes for tensors too, with a function that cuts a row out.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import accumulate, chain, repeat
from operator import getitem
from typing import Any, TypeAlias

import numpy as np

from gradclip.backends.base import CHUNK, ROW
from gradclip.backends.combining import Exact, Vector, combined

LONG = 2048
"""Elements in a row of large sets; longer ones are hardly faster."""
PICKED = 32
"""Long rows that are summed in float64 as well; of short ones, half as many."""
Cut: TypeAlias = Callable[[Any, int], Vector]
"""What cuts a row out of a matrix."""
Squares: TypeAlias = Callable[[list[Any]], Vector]
"""What sums the squares of all rows of some matrices in float32."""


class Rows:
    """Rows of many arrays: sums of squares over each, to be combined in float64."""

    def __init__(self, count: int) -> None:
        """Start with no rows, for so many elements in all, and nothing summed."""
        self.width = ROW if count < 8 * CHUNK else LONG
        self.matrices: list[Any] = []
        self.count = 0
        self.parts: list[float] = []
        self.doubt = False

    def add(self, matrices: list[Any]) -> None:
        """Take in arrays that were cut."""
        self.matrices += matrices
        self.counted(matrices)

    def counted(self, matrices: list[Any]) -> None:
        """Sum all rows so far, with these, if there are many of them."""
        self.count += sum(map(len, matrices))
        if self.count > CHUNK // 2:
            self.settle()

    def total(self) -> float | None:
        """Return the norm of all rows, or None if it is in doubt."""
        self.settle()
        # It neither over- nor underflows by squares.
        total = math.hypot(*self.parts)
        return None if self.doubt or not 1e-10 < total < math.inf else total

    def settle(self) -> None:
        """Sum the rows so far.

        All were cut before: Python between two passes over memory finds its own gone
        from the cache, and takes some times as long.
        """
        if self.count:
            # Squares may overflow, which the total shows.
            with np.errstate(all="ignore"):
                squares, exact = self.summed()
            picks = PICKED if self.width > ROW else PICKED // 2
            self.doubt |= not self._combine(squares, picks, exact)
            self.matrices, self.count = [], 0

    def summed(self) -> tuple[Vector, Exact]:
        """Return the sums of squares of all rows, and what sums some in float64."""
        return row_squares(self.matrices), partial(wide_squares, self.matrices)

    def _combine(self, squares: Vector, picks: int, exact: Exact) -> bool:
        """Combine sums of squares into one, and return whether that was possible."""
        for more in (picks, 8 * picks) if 8 * picks < squares.size else (picks,):
            ((total, doubt),) = combined(squares, [squares.size], more, exact)
            if not doubt:
                self.parts.append(math.sqrt(total))
                return True
        return False


def squares_apart(
    pieces: Sequence[list[Any]], squares_of: Squares, row: Cut = getitem
) -> list[tuple[float, bool]]:
    """Return the sum of squares of each array that was cut, and if it is in doubt."""
    counts = [sum(x.shape[0] for x in parts) for parts in pieces]
    found = []
    for start, stop, _ in batches(counts, CHUNK // 8):
        matrices = list(chain.from_iterable(pieces[start:stop]))
        exact = partial(wide_squares, matrices, row=row)
        squares = squares_of(matrices)
        found += combined(squares, counts[start:stop], PICKED // 2, exact)
    return found


def batches(sizes: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Yield where groups of at most a size, or of one, start and stop, and their size.

    One that is all of them takes no list of ends.
    """
    if 0 < (count := sum(sizes)) <= most:
        yield 0, len(sizes), count
        return
    ends = list(accumulate(sizes))
    start = done = 0
    while start < len(sizes):
        stop = max(start + 1, bisect_right(ends, done + most))
        yield start, stop, ends[stop - 1] - done
        start, done = stop, ends[stop - 1]


def cut(x: Any, size: int, width: int) -> list[Any]:
    """Return a contiguous tensor or array as rows: a matrix, and what is left over."""
    if even := _width(size, width):
        return [x.reshape(-1, even)]
    flat, whole = x.reshape(-1), size // width * width
    if not whole:
        return [flat.reshape(1, -1)]
    return [flat[:whole].reshape(-1, width), flat[whole:].reshape(1, -1)]


def cut_all(arrays: Sequence[Any], sizes: Sequence[int], width: int) -> list[Any]:
    """Return contiguous tensors or arrays as rows, all matrices in one list."""
    even = {size: _width(size, width) for size in set(sizes)}
    if all(even.values()):
        return [x.reshape(-1, even[n]) for x, n in zip(arrays, sizes, strict=True)]
    return list(chain.from_iterable(map(cut, arrays, sizes, repeat(width))))


@lru_cache(1 << 12)
def _width(size: int, most: int) -> int:
    """Return how long rows are if nothing is to be left over; 0 for none such."""
    # Whole vectors of the processor, if that can be as well.
    lengths = chain(range(most, most // 4, -16), range(most, most // 4, -1))
    return next((width for width in lengths if size % width == 0), 0)


def row_squares(matrices: Sequence[Vector]) -> Vector:
    """Return the sums of squares of all rows, taken in float32, as one vector."""
    return np.concatenate(list(map(np.vecdot, matrices, matrices)), dtype=np.float64)


def wide_squares(matrices: Sequence[Any], places: Vector, row: Cut = getitem) -> Vector:
    """Return the sums of squares of some rows, counted through all, in float64."""
    ends = list(accumulate((x.shape[0] for x in matrices), initial=0))
    found = np.empty(len(places))
    rows = []
    for place in places.tolist():
        owner = bisect_right(ends, place) - 1
        rows.append(row(matrices[owner], place - ends[owner]))
    widths = list(map(len, rows))
    for width in set(widths):
        chosen = [i for i, x in enumerate(widths) if x == width]
        # As many at a time as would fit into what all conversions go through.
        most = max(1, 2 * CHUNK // width)
        for start in range(0, len(chosen), most):
            some = chosen[start : start + most]
            wide = np.concatenate([rows[i] for i in some], dtype=np.float64)
            wide = wide.reshape(-1, width)
            found[some] = np.vecdot(wide, wide)
    return found
