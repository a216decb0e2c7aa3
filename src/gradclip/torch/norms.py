"""Norms of torch tensors: exact to float32 rounding, at the speed of the memory.

On the host, squares are summed in float32 over short rows and the rows in float64;
what float32 cannot hold, or gets wrong by bias, is summed again in float64. On other
devices, and under `torch.compile`, sums are in float64 and nothing is read back.
Sums of torch itself lose 1 % at 1e8 float32 elements on the CPU (pytorch#169237).
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gradclip.backends import CHUNK, ROW

SMALL = 4096
"""Tensors up to this size are gathered: a call would cost more than the copy."""
MIDDLE = 1 << 14
"""Tensors up to this size are measured many at a time, for the same reason."""
BLOCK = 1 << 26
"""Elements in one pass over rows, whose norms then take half a megabyte."""
PROBES = 16
"""Rows summed again in float64, to see whether float32 is biased on these values."""
BIAS = 9e-8
"""Below a unit in the last place of float32; a larger mean error is no accident."""

_gather = torch._C._nn.flatten_dense_tensors
_HALF = (torch.float16, torch.bfloat16)


def on_host(tensors: Iterable[Tensor]) -> bool:
    """Return whether numbers can be read without waiting for a device."""
    return not torch.compiler.is_compiling() and all(t.is_cpu for t in tensors)


def total_norm(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of all tensors taken together, 0-d and in float64."""
    if not on_host(tensors):
        return safe_norm(_device_norms(tensors, p), p)
    if p == 2:
        norm = _fast_total(tensors)
        if norm is not None:
            return norm
    return exact_norm(tensor_norms(tensors, p), p)


def wide_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each tensor, with every power summed in float64."""
    if not on_host(tensors):
        return _device_norms(tensors, p)
    return torch.stack([exact_norm(t, p) for t in tensors])


def wide_unit_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each row, with every power summed in float64."""
    return torch.cat([_wide_unit_norms(as_units(t), p) for t in tensors])


def rounded(norm: Tensor) -> Tensor:
    """Return a float64 norm rounded to the 24 bits of float32, whatever its size."""
    bits = norm.contiguous().view(torch.int64)
    return ((bits + (1 << 28)) & -(1 << 29)).view(torch.float64)


def tensor_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each tensor, in one float64 vector."""
    if not on_host(tensors):
        return _device_norms(tensors, p)
    if p != 2:
        return torch.stack([exact_norm(t, p) for t in tensors])
    norms = _fast_norms(tensors)
    for i in _doubtful(norms).nonzero().flatten().tolist():
        norms[i] = exact_norm(tensors[i], p)
    return norms


def unit_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each row of the first axis, for all tensors in turn."""
    vectors = [t for t in tensors if t.dim() < 2]
    if len(vectors) == len(tensors):
        return tensor_norms(vectors, p)
    # A vector is one unit, and many of them take one call.
    whole = iter(tensor_norms(vectors, p).split(1) if vectors else ())
    parts = (_unit_norms(t, p) if t.dim() > 1 else next(whole) for t in tensors)
    return torch.cat(list(parts))


def as_units(t: Tensor) -> Tensor:
    """Return a tensor as a matrix with one row a unit; vectors are one unit."""
    return t.flatten(1) if t.dim() > 1 else t.reshape(1, t.numel())


def exact_norm(t: Tensor, p: float) -> Tensor:
    """Return the `p`-norm of one tensor on the host, in float64 without overflow."""
    parts = [_wide_norm(chunk, p) for chunk in _wide_chunks(t)]
    return parts[0] if len(parts) == 1 else _wide_norm(torch.stack(parts), p)


def safe_norm(t: Tensor, p: float, dim: int | None = None) -> Tensor:
    """Return a norm in float64 divided by its largest element first; reads nothing."""
    moduli = t.abs().double()
    if moduli.numel() == 0:
        return moduli.sum(dim)
    largest = moduli.amax() if dim is None else moduli.amax(dim, keepdim=True)
    usable = largest.isfinite() & (largest > 0)
    unit = torch.where(usable, largest, 1.0)
    norm = unit * torch.linalg.vector_norm(
        moduli / unit, p, dim, keepdim=dim is not None
    )
    norm = torch.where(usable, norm, largest)
    return norm if dim is None else norm.squeeze(dim)


def _doubtful(norms: Tensor) -> Tensor:
    """Return where float32 squares may have over- or underflowed on the way."""
    return ~((norms > 1e-10) & (norms < math.inf))


def _wide_norm(chunk: Tensor, p: float) -> Tensor:
    """Return the norm of a float64 vector, scaled only where that is needed."""
    if chunk.numel() == 0:
        return chunk.sum()
    low, high = chunk.aminmax()
    largest = torch.maximum(low.abs(), high.abs())
    size = largest.item()
    if math.isinf(p) or size == 0 or not math.isfinite(size):
        return largest
    if p == 2 and 1e-140 < size < 1e140:
        return torch.linalg.vector_norm(chunk)
    return torch.linalg.vector_norm(chunk / largest, p) * largest


def _wide_chunks(t: Tensor) -> Iterator[Tensor]:
    """Yield the moduli of a tensor as short float64 vectors."""
    flat = _flat(t)
    if flat is None and t.numel() > CHUNK:
        for part in t.unbind(max(range(t.dim()), key=lambda d: t.shape[d])):
            yield from _wide_chunks(part)
        return
    flat = t.reshape(-1) if flat is None else flat
    if flat.is_complex():
        yield from (chunk.abs().double() for chunk in flat.split(CHUNK))
    else:
        yield from _converted(flat, torch.float64, CHUNK)


def _converted(flat: Tensor, dtype: torch.dtype, size: int) -> Iterator[Tensor]:
    """Yield pieces of a vector in another type; each is gone when the next one comes.

    One buffer serves all: a new one for each would leave the heap in pieces.
    """
    buffer = torch.empty(min(size, flat.numel()), dtype=dtype)
    for chunk in flat.split(size):
        yield buffer[: chunk.numel()].copy_(chunk)


def _flat(t: Tensor) -> Tensor | None:
    """Return a flat view, in any order since norms do not care; None without one."""
    if t.is_contiguous():
        return t.view(-1)
    dense = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return dense.view(-1) if dense.is_contiguous() else None


def _fast_total(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return the 2-norm of all tensors, or None where float32 rows will not do."""
    sizes = list(map(Tensor.numel, tensors))
    rows = Rows()
    if max(sizes) <= SMALL:
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


def _all_float32(tensors: Sequence[Tensor]) -> bool:
    return {t.dtype for t in tensors} == {torch.float32}


def _batches(tensors: list[Tensor], sizes: list[int]) -> Iterator[list[Tensor]]:
    """Yield tensors in groups whose copies stay in the cache."""
    ends = list(accumulate(sizes))
    start = done = 0
    while start < len(tensors):
        stop = max(start + 1, bisect_right(ends, done + CHUNK))
        yield tensors[start:stop]
        start, done = stop, ends[stop - 1]


def _joined(tensors: list[Tensor]) -> Tensor:
    """Return copies of tensors in one; types are widened, which changes no value."""
    try:
        return torch.cat(tensors)
    except RuntimeError:
        # Of unlike shapes, which takes four times as long.
        return _gather(tensors)


class Rows:
    """Norms of short rows of many tensors, to be combined in float64."""

    def __init__(self) -> None:
        """Start with no rows, and none of those that are summed twice as a probe."""
        self.norms: list[Tensor] = []
        self.probes: list[tuple[Tensor, Tensor]] = []
        self.rows = 0

    def add(self, t: Tensor) -> None:
        """Take the norms of the rows of one tensor."""
        flat = _flat(t)
        if flat is None or t.is_complex():
            self.norms.append(exact_norm(t, 2.0).reshape(1))
        elif t.dtype in _HALF:
            for chunk in _converted(flat, torch.float32, 4 * CHUNK):
                self._add(chunk)
        elif t.numel() <= BLOCK:
            self._add(flat)
        else:
            for block in flat.split(BLOCK):
                self._add(block)

    def add_gathered(self, tensors: list[Tensor], sizes: list[int]) -> None:
        """Take the norms of many small tensors, joined."""
        for batch in _batches(tensors, sizes):
            self.add(_joined(batch))

    def add_many(self, tensors: list[Tensor]) -> None:
        """Take the norms of many tensors of middle size, a call for all of them.

        Each may be some units off; the largest, which decide the sum, are summed by
        rows, and show whether the errors of the others are accidental.
        """
        if len(tensors) < 2 * PROBES:
            for t in tensors:
                self.add(t)
            return
        fast = torch.stack(torch._foreach_norm(tensors)).double()
        top = fast.nan_to_num(math.inf).topk(PROBES).indices
        exact = _row_norm(_joined([tensors[i] for i in top.tolist()]))
        if _differ(torch.linalg.vector_norm(fast[top]), exact):
            for t in tensors:
                self.add(t)
            return
        fast[top] = 0.0
        self.norms += [fast, exact.reshape(1)]

    def _add(self, flat: Tensor) -> None:
        count, rest = divmod(flat.numel(), ROW)
        if count:
            matrix = (flat[:-rest] if rest else flat).view(count, ROW)
            norms = torch.linalg.vector_norm(matrix, dim=1)
            if flat.dtype == torch.float32 and len(self.probes) < PROBES:
                self._probe(matrix, norms)
            # One huge element swallows small ones in float32; it is in the largest row.
            top = norms.argmax()
            norms[top] = torch.linalg.vector_norm(matrix[top].double())
            self.norms.append(norms)
            self.rows += count
            if self.rows > CHUNK // 2:
                self.norms = [self.take().reshape(1)]
        if rest:
            self.norms.append(
                torch.linalg.vector_norm(flat[-rest:].double()).reshape(1)
            )

    def _probe(self, matrix: Tensor, norms: Tensor) -> None:
        """Sum some rows in float64 as well: enough of the first tensor for a mean."""
        rows = len(norms)
        step = max(1, rows // PROBES) if not self.probes else rows
        exact = torch.linalg.vector_norm(matrix[::step].double(), dim=1)
        self.probes.append((norms[::step].double(), exact))

    def total(self) -> Tensor | None:
        """Return the norm of all rows, or None if it is in doubt."""
        if not self.norms:
            return None
        total = self.take()
        if not 1e-10 < total.item() < math.inf or self.biased():
            return None
        return total

    def take(self) -> Tensor:
        """Return the norm of the rows so far, in float64, and start anew."""
        dtypes = {norms.dtype for norms in self.norms}
        groups = [[n for n in self.norms if n.dtype == dtype] for dtype in dtypes]
        self.norms, self.rows = [], 0
        return torch.linalg.vector_norm(
            torch.cat([_gather(g).double() for g in groups])
        )

    def biased(self) -> bool:
        """Return whether float32 rounds these values one way, as it does constants."""
        if not self.probes:
            return False
        fast, exact = (torch.cat(part) for part in zip(*self.probes, strict=True))
        return _differ(torch.linalg.vector_norm(fast), torch.linalg.vector_norm(exact))


def _differ(norm: Tensor, exact: Tensor) -> bool:
    """Return whether a norm is further off than chance would have it."""
    return abs(norm.item() - exact.item()) > BIAS * exact.item()


def _row_norm(t: Tensor) -> Tensor:
    """Return the 2-norm of one tensor of middle size by its rows, unprobed."""
    flat = _flat(t)
    if flat is None or t.numel() % ROW:
        return exact_norm(t, 2.0)
    norms = torch.linalg.vector_norm(flat.view(-1, ROW), dim=1)
    return torch.linalg.vector_norm(norms.double())


def _fast_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each tensor, by float32 rows where there are many."""
    found: list[Tensor | None] = [None] * len(tensors)
    short = [i for i, t in enumerate(tensors) if t.numel() <= 2 * ROW and _is_real(t)]
    if short:
        few = [tensors[i] for i in short]
        for i, norm in zip(short, _short_norms(few), strict=True):
            found[i] = norm
    rows = Rows()
    long = [i for i, norm in enumerate(found) if norm is None]
    for i in long:
        rows.add(tensors[i])
        found[i] = rows.take()
    if rows.biased():
        for i in long:
            found[i] = exact_norm(tensors[i], 2.0)
    return torch.stack([norm for norm in found if norm is not None])


def _short_norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Return the 2-norms of short tensors in float64, in one call for all."""
    return torch._foreach_norm(tensors, 2, dtype=torch.float64)


def _is_real(t: Tensor) -> bool:
    return not t.is_complex()


def _unit_norms(t: Tensor, p: float) -> Tensor:
    """Return the `p`-norm of each unit of one tensor, in float64."""
    units = as_units(t)
    width = units.shape[1]
    simple = p == 2 and t.dtype in (torch.float32, torch.float64) and on_host([t])
    if not simple or width == 0:
        return _wide_unit_norms(units, p)
    size = width // ROW * ROW
    parts = [torch.linalg.vector_norm(units[:, size:], dim=1, keepdim=True)]
    if size:
        rows = units[:, :size].unflatten(1, (-1, ROW))
        parts.append(torch.linalg.vector_norm(rows, dim=2))
    norms = torch.linalg.vector_norm(torch.cat(parts, dim=1).double(), dim=1)
    doubt = _doubtful(norms)
    if doubt.any():
        # Rows of zeros are common (unused embeddings), and nothing is wrong with them.
        low, high = units.aminmax(dim=1)
        doubt &= ~((low == 0) & (high == 0))
        norms[doubt] = _wide_unit_norms(units[doubt], p)
    return norms


def _wide_unit_norms(units: Tensor, p: float) -> Tensor:
    """Return the norm of each row of a matrix in float64, some rows at a time."""
    rows = max(1, CHUNK // max(1, units.shape[1]))
    return torch.cat([safe_norm(part, p, dim=1) for part in units.split(rows)])


def _device_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each tensor in float64 without reading anything back."""
    device = tensors[0].device
    return torch.stack([_device_norm(t, p).to(device) for t in tensors])


def _device_norm(t: Tensor, p: float) -> Tensor:
    # Squares of float64 can overflow; those of narrower types fit into float64.
    if t.dtype in (torch.float64, torch.complex128) or t.numel() == 0:
        return safe_norm(t, p)
    wide = torch.complex128 if t.is_complex() else torch.float64
    return torch.linalg.vector_norm(t, p, dtype=wide)
