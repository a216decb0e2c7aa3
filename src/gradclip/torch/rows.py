"""The 2-norm of many tensors at the speed of the memory, within half a float32 unit.

Squares are summed in float32 over rows, and the rows in float64. What float32 gets
wrong by bias is measured by summing some rows twice, and taken away; where that leaves
a doubt, everything is summed in float64.
Sums of torch itself lose 1 % at 1e8 float32 elements on the CPU (pytorch#169237).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from gradclip.backends import CHUNK
from gradclip.backends.combining import Exact, Vector
from gradclip.backends.rows import (
    Rows,
    batches,
    cut,
    cut_all,
    row_squares,
    wide_squares,
)
from gradclip.backends.short import SMALL, fits_short, short_total
from gradclip.torch.exact import (
    WIDE,
    converted,
    exact_norm,
    flat_view,
    root_of_sum,
    scratch,
    wide_moduli,
)

ALONE = 1 << 16
"""Elements up to which one thread of NumPy sums squares faster than all of torch's."""
BLOCK = 1 << 26
"""Elements in one pass over rows."""
SOME = 500
"""Tensors that are cut before their rows are counted."""
FEW = 1 << 14
"""Elements in a tensor from which on a copy of its own costs less than joining it."""
MANY = 100
"""Tensors from which on it is worth trying whether they can be joined as they are."""

_HALF = (torch.float16, torch.bfloat16)
_DTYPE = attrgetter("dtype")
_SIMPLE = {Tensor}, {torch.float32}


def fast_total(tensors: Sequence[Tensor]) -> float | None:
    """Return the 2-norm of all tensors, or None where float32 rows will not do."""
    sizes = list(map(Tensor.numel, tensors))
    count = sum(sizes)
    largest = max(sizes)
    if fits_short(sizes):
        norm = _few_total(tensors, sizes)
        if norm is not None:
            return norm
    rows = TensorRows(count)
    if largest <= SMALL or count <= 2 * CHUNK:
        rows.short, rows.lengths = list(tensors), sizes
        return rows.total()
    alone, simple = [], _all_simple(tensors)
    for t, size in zip(tensors, sizes, strict=True):
        if size <= SMALL:
            rows.short.append(t)
            rows.lengths.append(size)
        elif size <= ALONE and (simple or _simple(t)):
            alone.append(t)
        else:
            rows.add_tensor(t)
    rows.add_many(alone)
    return rows.total()


def _few_total(tensors: Sequence[Tensor], sizes: Sequence[int]) -> float | None:
    """Return the norm of a few plain tensors that the cache holds, or None."""
    if not _all_simple(tensors):
        return None
    with suppress(RuntimeError):
        # Of lazy signs, and of what has a graph, NumPy gets no view.
        return short_total(list(map(Tensor.numpy, tensors)), sizes)
    return None


def _simple(t: Tensor) -> bool:
    """Return whether NumPy may read a tensor as one vector of float32."""
    return t.dtype == torch.float32 and type(t) is Tensor and t.is_contiguous()


def _all_simple(tensors: Sequence[Tensor]) -> bool:
    """Return the same of all tensors; quick for many."""
    kinds = set(map(type, tensors)), set(map(_DTYPE, tensors))
    return kinds == _SIMPLE and all(map(Tensor.is_contiguous, tensors))


class TensorRows(Rows):
    """Rows of many tensors: some summed by torch, and some by one thread of NumPy."""

    def __init__(self, count: int) -> None:
        """Start with nothing, for so many elements in all."""
        super().__init__(count)
        self.tensors: list[Tensor] = []
        self.short: list[Tensor] = []
        self.lengths: list[int] = []

    def add_tensor(self, t: Tensor) -> None:
        """Cut one tensor into rows."""
        flat = flat_view(t)
        if flat is None or t.is_complex():
            self.parts.append(exact_norm(t, 2.0).item())
        elif t.dtype == torch.float64:
            # If squares overflow, so does the total, and all is measured again, scaled.
            self.parts.append(root_of_sum(flat).item())
        else:
            for block in flat.split(BLOCK) if flat.numel() > BLOCK else (flat,):
                matrices = cut(block, block.numel(), self.width)
                self.tensors += matrices
                self.counted(matrices)

    def add_many(self, tensors: list[Tensor]) -> None:
        """Cut plain tensors into rows that one thread of NumPy will sum."""
        for start in range(0, len(tensors), SOME):
            some = tensors[start : start + SOME]
            try:
                arrays = list(map(Tensor.numpy, some))
            except RuntimeError:
                # Of lazy signs, and of what has a graph, NumPy gets no view.
                for t in some:
                    self.add_tensor(t)
                continue
            self.add(cut_all(arrays, list(map(Tensor.numel, some)), self.width))

    def total(self) -> float | None:
        """Return the norm of everything, or None if it is in doubt."""
        self.settle()
        for wide, _, narrow in wide_copies(self.short, self.lengths):
            # Nobody sees in float32 that `dot` adds one by one.
            square = torch.dot(wide, wide) if narrow else root_of_sum(wide).square_()
            self.parts.append(math.sqrt(square.item()))
        return super().total()

    def summed(self) -> tuple[Vector, Exact]:
        """Return the sums of squares of all rows, and what sums some in float64."""
        squares = [tensor_squares(self.tensors)] if self.tensors else []
        if self.matrices:
            squares.append(row_squares(self.matrices))
        exact = partial(wide_squares, [*self.tensors, *self.matrices], row=row_of)
        self.tensors = []
        return np.concatenate(squares), exact


def tensor_squares(matrices: list[Tensor]) -> Vector:
    """Return the sums of squares of all rows, taken in float32, as one vector."""
    norms = list(map(_row_norms, matrices))
    joined = torch.cat(norms) if len(norms) > 1 else norms[0]
    return np.square(joined.numpy(), dtype=np.float64)


def _row_norms(matrix: Tensor) -> Tensor:
    """Return the 2-norms of rows, in float32 for what is not float64."""
    if matrix.dtype not in _HALF:
        return torch.linalg.vector_norm(matrix, dim=1)
    # Torch would round such norms to half precision, or take many times as long.
    width = matrix.shape[1]
    pieces = converted(matrix.view(-1), torch.float32, width)
    norms = [torch.linalg.vector_norm(piece.view(-1, width), dim=1) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def row_of(matrix: Tensor | Vector, i: int) -> Vector:
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
    for start, stop, count in batches(sizes, 2 * CHUNK):
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


def _filled(room: Tensor, tensors: list[Tensor]) -> Tensor:
    """Return room that tensors were copied into, one behind the other."""
    parts = room.split(list(map(Tensor.numel, tensors)))
    for part, t in zip(parts, tensors, strict=True):
        part.copy_(t.reshape(-1))
    return room


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return copies of tensors in one; types are widened, which changes no value."""
    if len(tensors) > MANY:
        # Matrices of unlike widths raise, and so do 0-d tensors.
        with suppress(RuntimeError):
            return torch.cat(tensors).reshape(-1)
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors])
