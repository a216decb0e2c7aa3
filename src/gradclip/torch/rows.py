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
from functools import partial
from itertools import accumulate
from operator import attrgetter

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
MIDDLE = 1 << 14
"""Tensors up to this size take a `dot`; larger ones lose small elements by it."""
LONG = 2048
"""Elements in a row of large sets; longer ones are hardly faster."""
BLOCK = 1 << 26
"""Elements in one pass over rows."""
PICKED = 32
"""Long rows that are summed in float64 as well; of short ones, half as many."""
PROBES = 12
"""Tensors of middle size that are summed in float64 as well."""
FEW = 1 << 14
"""Elements in a tensor from which on a copy of its own costs less than joining it."""
MANY = 100
"""Tensors from which on it is worth trying whether they can be joined as they are."""
_HALF = (torch.float16, torch.bfloat16)
_DTYPE = attrgetter("dtype")


def fast_total(tensors: Sequence[Tensor]) -> float | None:
    """Return the 2-norm of all tensors, or None where float32 rows will not do."""
    sizes = list(map(Tensor.numel, tensors))
    count = sum(sizes)
    rows = Rows(ROW if count < 8 * CHUNK else LONG)
    if max(sizes) <= SMALL or count <= 2 * CHUNK:
        rows.short = list(tensors)
        return rows.total()
    if min(sizes) > SMALL and max(sizes) <= MIDDLE and _all_float32(tensors):
        rows.add_many(list(tensors))
        return rows.total()
    middle = []
    for t, size in zip(tensors, sizes, strict=True):
        if size <= SMALL:
            rows.short.append(t)
        elif size <= MIDDLE and t.dtype == torch.float32:
            middle.append(t)
        else:
            rows.add(t)
    rows.add_many(middle)
    return rows.total()


class Rows:
    """Norms of rows of many tensors, to be combined in float64."""

    def __init__(self, width: int) -> None:
        """Start with no rows of a width, and nothing that is summed already."""
        self.width = width
        self.matrices: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.short: list[Tensor] = []
        self.parts: list[float] = []
        self.ends = [0]
        self.doubt = False

    def add(self, t: Tensor) -> None:
        """Take the norms of the rows of one tensor."""
        flat = flat_view(t)
        if flat is None or t.is_complex():
            self.parts.append(exact_norm(t, 2.0).item())
            return
        if t.dtype == torch.float64:
            self.parts.append(root_of_sum(flat).item())
            return
        for block in flat.split(BLOCK) if flat.numel() > BLOCK else (flat,):
            matrix, rest = cut(block, self.width)
            if matrix is not None:
                self.matrices.append(matrix)
                self.norms.append(row_norms(matrix))
                self.ends.append(self.ends[-1] + block.numel() // self.width)
            if rest is not None:
                self.short.append(rest)
            if self.ends[-1] > CHUNK // 2:
                self._settle()

    def add_many(self, tensors: list[Tensor]) -> None:
        """Take the norms of many tensors of middle size, as of rows."""
        if len(tensors) >= 2 * PROBES and all(map(Tensor.is_contiguous, tensors)):
            flat = list(map(Tensor.ravel, tensors))
            squares = torch.stack(list(map(torch.dot, flat, flat)))
            exact = partial(wide_squares_of, flat)
            if self._combine(squares.double().numpy(), PROBES, exact):
                return
        for t in tensors:
            self.add(t)

    def total(self) -> float | None:
        """Return the norm of all rows, or None if it is in doubt."""
        self._settle()
        self._gather()
        # It neither over- nor underflows by squares.
        total = math.hypot(*self.parts)
        return None if self.doubt or not 1e-10 < total < math.inf else total

    def _gather(self) -> None:
        """Take the norm of all that is short, by copies in float64."""
        for wide, _, narrow in wide_copies(self.short):
            # Nobody sees in float32 that `dot` adds one by one.
            square = torch.dot(wide, wide) if narrow else root_of_sum(wide).square_()
            self.parts.append(math.sqrt(square.item()))

    def _settle(self) -> None:
        """Combine the rows so far."""
        if self.norms:
            exact = partial(wide_squares_of_rows, self.matrices, self.ends)
            squares = wide_squares(self.norms)
            picks = PICKED if self.width > ROW else PICKED // 2
            self.doubt |= not self._combine(squares, picks, exact)
            self.matrices, self.norms, self.ends = [], [], [0]

    def _combine(self, squares: Vector, picks: int, exact: Exact) -> bool:
        """Combine sums of squares into one, and return whether that was possible."""
        for more in (picks, 8 * picks) if 8 * picks < squares.size else (picks,):
            ((total, doubt),) = combined(squares, [squares.size], more, exact)
            if not doubt:
                self.parts.append(math.sqrt(total))
                return True
        return False


def cut(flat: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Return a vector as a matrix of rows, and what is left over, each if any."""
    count, rest = divmod(flat.numel(), width)
    if not rest:
        return flat.view(count, width), None
    if not count:
        return None, flat
    whole, left = flat.split_with_sizes((count * width, rest))
    return whole.view(count, width), left


def row_norms(matrix: Tensor) -> Tensor:
    """Return the 2-norms of rows, in float32 for what is not float64."""
    if matrix.dtype not in _HALF:
        return torch.linalg.vector_norm(matrix, dim=1)
    pieces = converted(matrix.view(-1), torch.float32)
    width = matrix.shape[1]
    norms = [torch.linalg.vector_norm(piece.view(-1, width), dim=1) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def wide_squares(norms: list[Tensor]) -> Vector:
    """Return the squares of norms, in float64."""
    joined = torch.cat(norms) if len(norms) > 1 else norms[0]
    return np.square(joined.numpy(), dtype=np.float64)


def wide_squares_of(tensors: list[Tensor], places: Vector) -> Vector:
    """Return the squared norms of some tensors, summed in float64."""
    wide = (tensors[i].double() for i in places)
    return np.square([torch.linalg.vector_norm(t).item() for t in wide])


def wide_squares_of_rows(
    matrices: list[Tensor], ends: list[int], places: Vector
) -> Vector:
    """Return the squared norms of some rows, counted through all, in float64."""
    owners = [(bisect_right(ends, i) - 1, i) for i in places.tolist()]
    # Most are alone in their tensor, so that `index_select` would take longer.
    rows = [matrices[k].select(0, i - ends[k]) for k, i in owners]
    # As many at a time as would fit into what all conversions go through.
    most = max(1, 2 * CHUNK // matrices[0].shape[1])
    parts = (torch.stack(rows[i : i + most]) for i in range(0, len(rows), most))
    norms = [torch.linalg.vector_norm(part.double(), dim=1) for part in parts]
    return wide_squares(norms)


def _all_float32(tensors: Sequence[Tensor]) -> bool:
    return set(map(_DTYPE, tensors)) == {torch.float32}


def wide_copies(tensors: list[Tensor]) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield the moduli of some tensors at a time, and of how many tensors.

    They are copies in a float64 vector, which stays in the cache, and may be changed;
    the next overwrites it.
    The flag says that all of them were narrower than that.
    """
    for start, stop, count in _batches(list(map(Tensor.numel, tensors))):
        batch = tensors[start:stop]
        if count < FEW * len(batch) or any(map(Tensor.is_complex, batch)):
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
