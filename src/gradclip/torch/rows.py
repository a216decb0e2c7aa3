"""The 2-norm of many tensors at the speed of the memory, within half a float32 unit.

Squares are summed in float32 over rows, and the rows in float64. What float32 gets
wrong by bias is measured by summing some rows twice, and taken away; where that leaves
a doubt, everything is summed in float64.
Sums of torch itself lose 1 % at 1e8 float32 elements on the CPU (pytorch#169237).
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate, chain, repeat
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradclip.backends import CHUNK, ROW
from gradclip.backends.combining import Exact, Vector, combined
from gradclip.torch.exact import (
    WIDE,
    converted,
    exact_norm,
    flat_view,
    root_of_sum,
    scratch,
    wide_moduli,
)

SMALL = 4096
"""Tensors up to this size are gathered: a call would cost more than the copy."""
LONG = 2048
"""Elements in a row of large sets; longer ones are hardly faster."""
ALONE = 1 << 16
"""Elements up to which one thread of NumPy sums squares faster than all of torch's."""
BLOCK = 1 << 26
"""Elements in one pass over rows."""
PICKED = 32
"""Long rows that are summed in float64 as well; of short ones, half as many."""
SOME = 500
"""Tensors that are cut before their rows are counted."""
FEW = 1 << 14
"""Elements in a tensor from which on a copy of its own costs less than joining it."""
MANY = 100
"""Tensors from which on it is worth trying whether they can be joined as they are."""
Matrix: TypeAlias = Tensor | Vector

_HALF = (torch.float16, torch.bfloat16)
_DTYPE = attrgetter("dtype")


def fast_total(tensors: Sequence[Tensor]) -> float | None:
    """Return the 2-norm of all tensors, or None where float32 rows will not do."""
    sizes = list(map(Tensor.numel, tensors))
    count = sum(sizes)
    rows = Rows(ROW if count < 8 * CHUNK else LONG)
    if max(sizes) <= SMALL or count <= 2 * CHUNK:
        rows.short, rows.lengths = list(tensors), sizes
        return rows.total()
    alone = []
    for t, size in zip(tensors, sizes, strict=True):
        if size <= SMALL:
            rows.short.append(t)
            rows.lengths.append(size)
        elif size <= ALONE and _simple(t):
            alone.append(t)
        else:
            rows.add(t)
    rows.add_many(alone)
    return rows.total()


def _simple(t: Tensor) -> bool:
    """Return whether NumPy may read a tensor as one vector of float32."""
    return t.dtype == torch.float32 and type(t) is Tensor and t.is_contiguous()


class Rows:
    """Rows of many tensors: sums of squares over each, to be combined in float64."""

    def __init__(self, width: int) -> None:
        """Start with no rows of a width, and nothing that is summed already."""
        self.width = width
        self.matrices: list[Tensor] = []
        self.arrays: list[Vector] = []
        self.count = 0
        self.short: list[Tensor] = []
        self.lengths: list[int] = []
        self.parts: list[float] = []
        self.doubt = False

    def add(self, t: Tensor) -> None:
        """Cut one tensor into rows."""
        flat = flat_view(t)
        if flat is None or t.is_complex():
            self.parts.append(exact_norm(t, 2.0).item())
        elif t.dtype == torch.float64:
            self.parts.append(root_of_sum(flat).item())
        else:
            for block in flat.split(BLOCK) if flat.numel() > BLOCK else (flat,):
                matrices = cut(block, block.numel(), self.width)
                self.matrices += matrices
                self._count(matrices)

    def add_many(self, tensors: list[Tensor]) -> None:
        """Cut plain tensors into rows that one thread of NumPy will sum."""
        for start in range(0, len(tensors), SOME):
            some = tensors[start : start + SOME]
            try:
                arrays = list(map(Tensor.numpy, some))
            except RuntimeError:
                # Of lazy signs, and of what has a graph, NumPy gets no view.
                for t in some:
                    self.add(t)
                continue
            pieces = map(cut, arrays, map(Tensor.numel, some), repeat(self.width))
            matrices = list(chain.from_iterable(pieces))
            self.arrays += matrices
            self._count(matrices)

    def _count(self, matrices: list[Any]) -> None:
        """Sum all rows so far if there are many of them."""
        self.count += sum(x.shape[0] for x in matrices)
        if self.count > CHUNK // 2:
            self._settle()

    def total(self) -> float | None:
        """Return the norm of all rows, or None if it is in doubt."""
        self._settle()
        self._gather()
        # It neither over- nor underflows by squares.
        total = math.hypot(*self.parts)
        return None if self.doubt or not 1e-10 < total < math.inf else total

    def _gather(self) -> None:
        """Take the norm of all that is short, by copies in float64."""
        for wide, _, narrow in wide_copies(self.short, self.lengths):
            # Nobody sees in float32 that `dot` adds one by one.
            square = torch.dot(wide, wide) if narrow else root_of_sum(wide).square_()
            self.parts.append(math.sqrt(square.item()))

    def _settle(self) -> None:
        """Sum the rows so far.

        All were cut before: Python between two passes over memory finds its own gone
        from the cache, and takes some times as long.
        """
        if self.count:
            with np.errstate(all="ignore"):
                squares = row_squares(self.matrices, self.arrays)
            exact = partial(wide_squares, [*self.matrices, *self.arrays])
            picks = PICKED if self.width > ROW else PICKED // 2
            self.doubt |= not self._combine(squares, picks, exact)
            self.matrices, self.arrays, self.count = [], [], 0

    def _combine(self, squares: Vector, picks: int, exact: Exact) -> bool:
        """Combine sums of squares into one, and return whether that was possible."""
        for more in (picks, 8 * picks) if 8 * picks < squares.size else (picks,):
            ((total, doubt),) = combined(squares, [squares.size], more, exact)
            if not doubt:
                self.parts.append(math.sqrt(total))
                return True
        return False


def cut(x: Any, size: int, width: int) -> list[Any]:
    """Return a contiguous tensor or array as rows: a matrix, and what is left over."""
    if even := _width(size, width):
        return [x.reshape(-1, even)]
    flat, whole = x.reshape(-1), size // width * width
    if not whole:
        return [flat.reshape(1, -1)]
    return [flat[:whole].reshape(-1, width), flat[whole:].reshape(1, -1)]


@lru_cache(1 << 12)
def _width(size: int, most: int) -> int:
    """Return how long rows are if nothing is to be left over; 0 for none such."""
    # Whole vectors of the processor, if that can be as well.
    lengths = chain(range(most, most // 4, -16), range(most, most // 4, -1))
    return next((width for width in lengths if size % width == 0), 0)


def row_squares(matrices: list[Tensor], arrays: Sequence[Vector] = ()) -> Vector:
    """Return the sums of squares of all rows, taken in float32, as one vector."""
    parts = list(map(np.vecdot, arrays, arrays))
    if matrices:
        norms = list(map(_row_norms, matrices))
        joined = torch.cat(norms) if len(norms) > 1 else norms[0]
        parts.insert(0, np.square(joined.numpy(), dtype=np.float64))
    return np.concatenate(parts).astype(np.float64, copy=False)


def _row_norms(matrix: Tensor) -> Tensor:
    """Return the 2-norms of rows, in float32 for what is not float64."""
    if matrix.dtype not in _HALF:
        return torch.linalg.vector_norm(matrix, dim=1)
    width = matrix.shape[1]
    pieces = converted(matrix.view(-1), torch.float32, width)
    norms = [torch.linalg.vector_norm(piece.view(-1, width), dim=1) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def wide_squares(matrices: Sequence[Matrix], places: Vector) -> Vector:
    """Return the sums of squares of some rows, counted through all, in float64."""
    ends = list(accumulate((x.shape[0] for x in matrices), initial=0))
    found = np.empty(len(places))
    rows = []
    for place in places.tolist():
        owner = bisect_right(ends, place) - 1
        rows.append(_row(matrices[owner], place - ends[owner]))
    widths = list(map(len, rows))
    for width in set(widths):
        chosen = [i for i, x in enumerate(widths) if x == width]
        # As many at a time as would fit into what all conversions go through.
        most = max(1, 2 * CHUNK // width)
        for start in range(0, len(chosen), most):
            some = chosen[start : start + most]
            wide = np.array([rows[i] for i in some], dtype=np.float64)
            found[some] = np.vecdot(wide, wide)
    return found


def _row(matrix: Matrix, i: int) -> Vector:
    """Return a row as an array: NumPy cuts it out, and joins it, the fastest."""
    if not isinstance(matrix, Tensor):
        return matrix[i]
    if matrix.dtype == torch.float32 and not matrix.is_neg():
        return matrix.numpy()[i]
    return matrix[i].float().resolve_neg().numpy()


def wide_copies(
    tensors: list[Tensor], sizes: list[int]
) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield the moduli of some tensors at a time, and of how many tensors.

    They are copies in a float64 vector, which stays in the cache, and may be changed;
    the next overwrites it.
    The flag says that all of them were narrower than that.
    """
    for start, stop, count in _batches(sizes):
        batch = tensors[start:stop]
        if count < FEW * len(batch) or any(map(Tensor.is_complex, batch)):
            # One tensor has the widest type of all, which takes no pass over them.
            batch = [_joined(batch)]
        if batch[0].is_complex():
            wide = wide_moduli(batch[0]).reshape(-1)
        elif count < FEW:
            wide = batch[0].double()
        else:
            wide = _filled(scratch(torch.float64)[:count], batch)
        yield wide, stop - start, WIDE.isdisjoint(map(_DTYPE, batch))


def _batches(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield where groups of tensors start and stop, and how many elements they have."""
    if 0 < (count := sum(sizes)) <= 2 * CHUNK:
        yield 0, len(sizes), count
        return
    ends = list(accumulate(sizes))
    start = done = 0
    while start < len(sizes):
        stop = max(start + 1, bisect_right(ends, done + 2 * CHUNK))
        yield start, stop, ends[stop - 1] - done
        start, done = stop, ends[stop - 1]


def _filled(room: Tensor, tensors: list[Tensor]) -> Tensor:
    """Return room that tensors were copied into, one behind the other."""
    parts = room.split(list(map(Tensor.numel, tensors)))
    for part, t in zip(parts, tensors, strict=True):
        part.copy_(t.reshape(-1))
    return room


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return copies of tensors in one; types are widened, which changes no value."""
    if len(tensors) > MANY:
        with suppress(RuntimeError):
            return torch.cat(tensors).reshape(-1)
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors])
