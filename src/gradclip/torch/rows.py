"""The 2-norm of many tensors at the speed of the memory, within half a float32 unit.

Squares are summed in float32 over rows, and the rows in float64. What float32 gets
wrong by bias is measured by summing some rows twice, and taken away; where that leaves
a doubt, everything is summed in float64.
Sums of torch itself lose 1 % at 1e8 float32 elements on the CPU (pytorch#169237).
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from operator import attrgetter

import torch
from torch import Tensor

from gradclip.backends import CHUNK
from gradclip.torch.combining import Exact, combined
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
"""Tensors up to this size are measured many at a time, for the same reason."""
LONG = 2048
"""Elements in a row where one norm is asked for; longer ones are hardly faster."""
BLOCK = 1 << 26
"""Elements in one pass over rows."""
PICKED = 32
"""Rows of a sum that are summed in float64 as well; half as many for single tensors."""
PROBES = 16
"""Tensors of middle size that are summed in float64 as well."""
FEW = 1 << 14
"""Elements in a tensor from which on a copy of its own costs less than joining it."""
_HALF = (torch.float16, torch.bfloat16)
_DTYPE = attrgetter("dtype")


def fast_total(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the 2-norm of all tensors, or None where float32 rows will not do."""
    sizes = list(map(Tensor.numel, tensors))
    rows = Rows()
    if max(sizes) <= SMALL or sum(sizes) <= 2 * CHUNK:
        rows.add_gathered(list(tensors), sizes)
        return rows.total()
    if min(sizes) > SMALL and max(sizes) <= MIDDLE and _all_float32(tensors):
        rows.add_many(list(tensors))
        return rows.total()
    small, small_sizes, middle = [], [], []
    for t, size in zip(tensors, sizes, strict=True):
        if size <= SMALL:
            small.append(t)
            small_sizes.append(size)
        elif size <= MIDDLE and t.dtype == torch.float32:
            middle.append(t)
        else:
            rows.add(t)
    rows.add_gathered(small, small_sizes)
    rows.add_many(middle)
    return rows.total()


class Rows:
    """Norms of short rows of many tensors, to be combined in float64."""

    def __init__(self) -> None:
        """Start with no rows, and nothing that is summed already."""
        self.matrices: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.exact: list[Tensor] = []
        self.rows = 0
        self.doubt = False

    def add(self, t: Tensor) -> None:
        """Take the norms of the rows of one tensor."""
        flat = flat_view(t)
        if flat is None or t.is_complex():
            self.exact.append(exact_norm(t, 2.0).reshape(1))
            return
        if t.dtype == torch.float64:
            self.exact.append(root_of_sum(flat).reshape(1))
            return
        for block in flat.split(BLOCK) if flat.numel() > BLOCK else (flat,):
            matrix, rest = cut(block, LONG)
            if len(matrix):
                self.matrices.append(matrix)
                self.norms.append(row_norms(matrix))
                self.rows += len(matrix)
            if rest is not None:
                self.exact.append(torch.linalg.vector_norm(rest.double()).reshape(1))
            if self.rows > CHUNK // 2:
                self._settle()

    def add_gathered(self, tensors: list[Tensor], sizes: list[int]) -> None:
        """Take the norm of many small tensors, by copies in float64."""
        for wide, _, narrow in wide_copies(tensors, sizes):
            # Nobody sees in float32 that `dot` adds one by one.
            norm = torch.dot(wide, wide).sqrt_() if narrow else root_of_sum(wide)
            self.exact.append(norm.reshape(1))

    def add_many(self, tensors: list[Tensor]) -> None:
        """Take the norms of many tensors of middle size, a call for all of them.

        Each may be some units off. Some are summed in float64 too, as rows are.
        """
        if len(tensors) < 2 * PROBES:
            for t in tensors:
                self.add(t)
            return
        fast = torch.stack(torch._foreach_norm(tensors))
        exact = partial(wide_norms_of, tensors)
        if not self._combine([fast], len(tensors), PROBES, exact):
            for t in tensors:
                self.add(t)

    def total(self) -> Tensor | None:
        """Return the norm of all rows, or None if it is in doubt."""
        self._settle()
        if not self.exact:
            return None
        found = self.exact
        total = root_of_sum(torch.cat(found)) if len(found) > 1 else found[0].sum()
        if self.doubt or not 1e-10 < total.item() < math.inf:
            return None
        return total

    def _settle(self) -> None:
        """Combine the rows so far."""
        if self.norms:
            exact = partial(wide_norms_of_rows, self.matrices)
            self.doubt |= not self._combine(self.norms, self.rows, PICKED, exact)
            self.matrices, self.norms, self.rows = [], [], 0

    def _combine(
        self, norms: list[Tensor], count: int, picks: int, exact: Exact
    ) -> bool:
        """Combine norms into one, and return whether that was possible."""
        for more in (picks, 8 * picks) if 8 * picks < count else (picks,):
            norm, doubt = combined(norms, [count], more, exact)
            if not doubt:
                self.exact.append(norm)
                return True
        return False


def cut(flat: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Return a vector as a matrix of rows, and what is left over, if anything."""
    rest = flat.numel() % width
    if not rest:
        return flat.view(-1, width), None
    return flat[:-rest].view(-1, width), flat[-rest:]


def row_norms(matrix: Tensor) -> Tensor:
    """Return the 2-norms of rows, in float32 for what is not float64."""
    if matrix.dtype not in _HALF:
        return torch.linalg.vector_norm(matrix, dim=1)
    pieces = converted(matrix.view(-1), torch.float32)
    width = matrix.shape[1]
    norms = [torch.linalg.vector_norm(piece.view(-1, width), dim=1) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def wide_norms_of(tensors: list[Tensor], chosen: Tensor) -> Tensor:
    """Return the 2-norms of some tensors, summed in float64."""
    wide = (tensors[i].double() for i in chosen.tolist())
    return torch.stack(list(map(torch.linalg.vector_norm, wide)))


def wide_norms_of_rows(matrices: list[Tensor], chosen: Tensor) -> Tensor:
    """Return the 2-norms of some rows of matrices, summed in float64."""
    return torch.linalg.vector_norm(_chosen(matrices, chosen), dim=1)


def _chosen(matrices: list[Tensor], chosen: Tensor) -> Tensor:
    """Return some rows, counted through all matrices in ascending order, in float64."""
    ends = torch.tensor([0, *accumulate(map(len, matrices))])
    owners = torch.searchsorted(ends, chosen, right=True) - 1
    which, counts = owners.unique_consecutive(return_counts=True)
    within = (chosen - ends[owners]).split(counts.tolist())
    places = zip(which.tolist(), within, strict=True)
    return torch.cat([matrices[k].index_select(0, rows) for k, rows in places]).double()


def _all_float32(tensors: Sequence[Tensor]) -> bool:
    return set(map(_DTYPE, tensors)) == {torch.float32}


def wide_copies(
    tensors: list[Tensor], sizes: list[int]
) -> Iterator[tuple[Tensor, int, bool]]:
    """Yield the moduli of some tensors at a time, and of how many tensors.

    They are in one float64 vector, which stays in the cache; the next overwrites it.
    The flag says that all of them were narrower than that.
    """
    for start, stop, count in _batches(sizes):
        batch = tensors[start:stop]
        if count < FEW * len(batch) or any(map(Tensor.is_complex, batch)):
            batch = [_joined(batch)]
        if batch[0].is_complex():
            wide = wide_moduli(batch[0]).reshape(-1)
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
    try:
        return torch.cat(tensors)
    except RuntimeError:
        return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors])
