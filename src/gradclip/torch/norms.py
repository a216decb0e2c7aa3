"""Norms of torch tensors: exact to float32 rounding, at the speed of the memory.

On the host, squares are summed in float32 over short rows and the rows in float64;
what float32 cannot hold, or gets wrong by bias, is summed again in float64. On other
devices, and under `torch.compile`, sums are in float64 and nothing is read back.
Sums of torch itself lose 1 % at 1e8 float32 elements on the CPU (pytorch#169237).
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from gradclip.backends import CHUNK, ROW

SMALL = 4096
"""Tensors up to this size are gathered: a call would cost more than the copy."""
MIDDLE = 1 << 14
"""Tensors up to this size are measured many at a time, for the same reason."""
BLOCK = 1 << 26
"""Elements in one pass over rows, whose norms then take half a megabyte."""
PICKED = 64
"""Rows of a sum that are summed in float64 as well; a quarter for single tensors."""
PROBES = 16
"""Tensors of middle size that are summed by rows as well."""
BIAS = 9e-8
"""Below a unit in the last place of float32; a larger mean error is no accident."""

Measure: TypeAlias = Callable[[list[Tensor]], list[Tensor]]

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
    return exact_norm(wide_norms(tensors, p), p)


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
    parts = [_unit_norms(t, p) if t.dim() > 1 else next(whole) for t in tensors]
    norms = torch.cat(parts).double()
    if p == 2 and on_host(tensors) and (doubt := _doubtful(norms)).any():
        pieces = zip(tensors, norms.split(list(map(len, parts))), strict=True)
        flags = doubt.split(list(map(len, parts)))
        for (t, part), flag in zip(pieces, flags, strict=True):
            if t.dim() > 1 and _plain(t) and flag.any():
                _mend_unit_norms(as_units(t), part, flag)
    return norms


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


def _row_norms(matrix: Tensor) -> Tensor:
    """Return the 2-norms of rows, in float32 for what is not float64."""
    if matrix.dtype not in _HALF:
        return torch.linalg.vector_norm(matrix, dim=1)
    chunks = _converted(matrix.view(-1), torch.float32, 4 * CHUNK)
    norms = [torch.linalg.vector_norm(chunk.view(-1, ROW), dim=1) for chunk in chunks]
    return torch.cat(norms)


def _cut(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return a vector as a matrix of rows, and what is left over."""
    size = flat.numel() // ROW * ROW
    return flat[:size].view(-1, ROW), flat[size:]


def _combined(
    matrices: list[Tensor], norms: list[Tensor], counts: list[int], picks: int
) -> tuple[Tensor, Tensor]:
    """Combine norms of rows into one norm for each group of `counts` rows, in float64.

    Some rows are summed in float64 as well, chosen at equal steps of the sum of
    squares: none that decides it is left out (one huge element swallows small ones in
    float32), and the others show whether float32 rounds these values one way, as it
    does constants.

    Returns:
        The norm of each group, and whether its rows are rounded one way.
    """
    rows = torch.cat(norms).double()
    sizes = torch.tensor(counts)
    rough = torch.stack(torch._foreach_norm(rows.split(counts)))
    usable = (rough > 0) & (rough < math.inf)
    # A group of zeros, or with an infinity, must not shift the places of the others.
    even = torch.where(usable, 0.0, 1 / sizes.double())
    unit = torch.where(usable, rough, math.inf)
    shares = (rows / unit.repeat_interleave(sizes)).square().nan_to_num()
    shares = (shares + even.repeat_interleave(sizes)).cumsum(0)
    steps = torch.arange(0.5, picks, dtype=torch.float64) / picks
    steps = torch.arange(len(counts)).unsqueeze(1) + steps
    ends = sizes.cumsum(0).unsqueeze(1)
    chosen = torch.searchsorted(shares, steps)
    chosen = chosen.clamp(ends - sizes.unsqueeze(1), ends - 1)
    exact = torch.linalg.vector_norm(_chosen(matrices, chosen.flatten()), dim=1)
    pair = torch.stack([rows[chosen], exact.view_as(chosen)])
    light = pair[0].square() * picks < rough.square().unsqueeze(1)
    fast, true = torch.linalg.vector_norm(pair * light, dim=2)
    rows[chosen.flatten()] = exact
    total = torch.stack(torch._foreach_norm(rows.split(counts)))
    return total, (fast - true).abs() > BIAS * true


def _chosen(matrices: list[Tensor], chosen: Tensor) -> Tensor:
    """Return some rows, counted through all matrices in ascending order, in float64."""
    ends = list(accumulate(map(len, matrices)))
    owners = torch.searchsorted(torch.tensor(ends), chosen, right=True)
    which, counts = owners.unique_consecutive(return_counts=True)
    places = zip(which.tolist(), chosen.split(counts.tolist()), strict=True)
    return torch.cat(
        [matrices[k][rows - ends[k] + len(matrices[k])] for k, rows in places]
    ).double()


class Rows:
    """Norms of short rows of many tensors, to be combined in float64."""

    def __init__(self) -> None:
        """Start with no rows, and nothing that is summed already."""
        self.matrices: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.exact: list[Tensor] = []
        self.rows = 0
        self.biased = False

    def add(self, t: Tensor) -> None:
        """Take the norms of the rows of one tensor."""
        flat = _flat(t)
        if flat is None or t.is_complex():
            self.exact.append(exact_norm(t, 2.0).reshape(1))
            return
        for block in flat.split(BLOCK) if flat.numel() > BLOCK else (flat,):
            matrix, rest = _cut(block)
            norms = _row_norms(matrix)
            if norms.dtype == torch.float64:
                self.exact.append(norms)
            else:
                self.matrices.append(matrix)
                self.norms.append(norms)
                self.rows += len(matrix)
            if len(rest):
                self.exact.append(torch.linalg.vector_norm(rest.double()).reshape(1))
            if self.rows > CHUNK // 2:
                self._settle()

    def add_gathered(self, tensors: list[Tensor], sizes: list[int]) -> None:
        """Take the norm of many small tensors, joined."""
        for batch in _batches(tensors, sizes):
            joined = _joined(batch)
            if joined.is_complex():
                self.exact.append(exact_norm(joined, 2.0).reshape(1))
            else:
                self.exact.append(torch.linalg.vector_norm(joined.double()).reshape(1))

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
        self.exact += [fast, exact.reshape(1)]

    def total(self) -> Tensor | None:
        """Return the norm of all rows, or None if it is in doubt."""
        self._settle()
        if not self.exact:
            return None
        total = torch.linalg.vector_norm(torch.cat(self.exact))
        if self.biased or not 1e-10 < total.item() < math.inf:
            return None
        return total

    def _settle(self) -> None:
        """Combine the rows so far."""
        if self.norms:
            norm, biased = _combined(self.matrices, self.norms, [self.rows], PICKED)
            self.exact.append(norm)
            self.biased |= bool(biased)
            self.matrices, self.norms, self.rows = [], [], 0


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
    places: dict[Measure, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(_measure(t), []).append(i)
    norms = torch.empty(len(tensors), dtype=torch.float64)
    for measure, chosen in places.items():
        norms[chosen] = torch.stack(measure([tensors[i] for i in chosen]))
    return norms


def _measure(t: Tensor) -> Measure:
    """Return what measures tensors of this size and type best."""
    if t.is_complex() or (t.numel() > MIDDLE and _flat(t) is None):
        return _exact_norms
    if t.numel() <= 2 * ROW:
        return _short_norms
    return _middle_norms if t.numel() <= MIDDLE else _long_norms


def _exact_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the 2-norms of tensors of any kind, in float64."""
    return [exact_norm(t, 2.0) for t in tensors]


def _short_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the 2-norms of short tensors in float64, in one call for all."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float64))


def _middle_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the 2-norms of tensors of some rows, of which float64 copies are cheap."""
    return [torch.linalg.vector_norm(t.double()) for t in tensors]


def _long_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the 2-norms of tensors of many rows each, in float64."""
    cut = [_cut(flat) for t in tensors if (flat := _flat(t)) is not None]
    matrices, rests = [matrix for matrix, _ in cut], [rest for _, rest in cut]
    counts = list(map(len, matrices))
    norms, biased = _combined(
        matrices, list(map(_row_norms, matrices)), counts, PICKED // 4
    )
    norms = torch.hypot(norms, torch.stack(_short_norms(rests)))
    for i in biased.nonzero().flatten().tolist():
        norms[i] = exact_norm(tensors[i], 2.0)
    return list(norms.unbind())


def _unit_norms(t: Tensor, p: float) -> Tensor:
    """Return the `p`-norm of each unit of one tensor; of float32, maybe in doubt."""
    units = as_units(t)
    if not (p == 2 and _plain(t) and on_host([t])):
        return _wide_unit_norms(units, p)
    width = units.shape[1]
    if width <= ROW:
        return torch.linalg.vector_norm(units, dim=1)
    size = width // ROW * ROW
    rows = units[:, :size].unflatten(1, (-1, ROW))
    parts = [torch.linalg.vector_norm(rows, dim=2)]
    if size < width:
        parts.append(torch.linalg.vector_norm(units[:, size:], dim=1, keepdim=True))
    return torch.linalg.vector_norm(torch.cat(parts, dim=1).double(), dim=1)


def _plain(t: Tensor) -> bool:
    """Return whether there are elements, of a type whose rows are summed as it is."""
    return t.dtype in (torch.float32, torch.float64) and t.numel() > 0


def _mend_unit_norms(units: Tensor, norms: Tensor, doubt: Tensor) -> None:
    """Measure units in doubt again, in float64."""
    # Rows of zeros are common (unused embeddings), and nothing is wrong with them.
    low, high = units.aminmax(dim=1)
    doubt = doubt & ~((low == 0) & (high == 0))
    norms[doubt] = _wide_unit_norms(units[doubt], 2.0)


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
