"""Norms of torch tensors: exact to float32 rounding, at the speed of the memory.

On the host they are taken by rows where those can be trusted, else in float64; on other
devices, and under `torch.compile`, always in float64, and nothing is read back.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradclip.backends import CHUNK, ROW
from gradclip.backends.rows import cut, squares_apart
from gradclip.torch.exact import (
    SHORT,
    device_norms,
    doubtful,
    exact_norm,
    flat_view,
    on_host,
    root_of_sum,
    safe_norm,
)
from gradclip.torch.rows import fast_total, row_of, tensor_squares, wide_copies

MIDDLE = 1 << 14
"""Elements in a tensor up to which a copy in float64 costs less than rows."""
Measure: TypeAlias = Callable[[list[Tensor]], Tensor]


def total_norm(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of all tensors taken together, 0-d and in float64."""
    if not on_host(tensors):
        return safe_norm(device_norms(tensors, p), p)
    return torch.tensor(host_total(tensors, p), dtype=torch.float64, device="cpu")


def host_total(tensors: Sequence[Tensor], p: float) -> float:
    """Return the `p`-norm of all tensors, which are on the host."""
    if p == 2:
        norm = fast_total(tensors)
        if norm is not None:
            return norm
    return exact_norm(wide_norms(tensors, p), p).item()


def wide_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each tensor, with every power summed in float64."""
    if not on_host(tensors):
        return device_norms(tensors, p)
    return torch.stack([exact_norm(t, p) for t in tensors])


def wide_unit_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each row, with every power summed in float64."""
    return torch.cat([_wide_unit_norms(as_units(t), p) for t in tensors])


def rounded(norm: Tensor) -> Tensor:
    """Return a float64 norm rounded to the 24 bits of float32, whatever its size."""
    bits = norm.contiguous().view(torch.int64)
    # Half of the last place is added before the rest is cut off; a carry moves into
    # the exponent, where it belongs.
    return ((bits + (1 << 28)) & -(1 << 29)).view(torch.float64)


def tensor_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each tensor, in one float64 vector."""
    if p != 2 or not on_host(tensors):
        return wide_norms(tensors, p)
    norms = _fast_norms(tensors)
    for i in doubtful(norms).nonzero().flatten().tolist():
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
    if p == 2 and on_host(tensors) and (doubt := doubtful(norms)).any():
        pieces = zip(tensors, norms.split(list(map(len, parts))), strict=True)
        flags = doubt.split(list(map(len, parts)))
        for (t, part), flag in zip(pieces, flags, strict=True):
            # Vectors were mended before, and other types measured in float64.
            if t.dim() > 1 and _plain(t) and flag.any():
                _mend_unit_norms(as_units(t), part, flag)
    return norms


def as_units(t: Tensor) -> Tensor:
    """Return a tensor as a matrix with one row a unit; vectors are one unit."""
    return t.flatten(1) if t.dim() > 1 else t.reshape(1, t.numel())


def _fast_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each tensor, by float32 rows where there are many."""
    places: dict[Measure, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(_measure(t), []).append(i)
    norms = torch.empty(len(tensors), dtype=torch.float64, device="cpu")
    for measure, chosen in places.items():
        norms[chosen] = measure([tensors[i] for i in chosen])
    return norms


def _measure(t: Tensor) -> Measure:
    """Return what measures tensors of this size and type best."""
    size = t.numel()
    # No wider type is left to sum float64 in, so that its squares are added in pairs.
    if t.dtype == torch.float64 and size > SHORT and flat_view(t) is not None:
        return _paired_norms
    if size <= 2 * ROW:
        return _short_norms
    if t.is_complex() or (size > MIDDLE and flat_view(t) is None):
        return _exact_norms
    return _middle_norms if size <= MIDDLE else _long_norms


def _short_norms(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norms of short tensors, joined: a call for each takes longer."""
    sizes = list(map(Tensor.numel, tensors))
    found, start = [], 0
    for wide, count, _ in wide_copies(tensors, sizes):
        lengths = torch.tensor(sizes[start : start + count], device="cpu")
        squares = torch.segment_reduce(wide.square_(), "sum", lengths=lengths)
        found.append(squares.sqrt_())
        start += count
    return torch.cat(found)


def _exact_norms(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norms of tensors of any kind, in float64."""
    return wide_norms(tensors, 2.0)


def _paired_norms(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norms of float64 tensors, whose sums keep all their digits."""
    flat = (flat_view(t) for t in tensors)
    return torch.stack([root_of_sum(x) for x in flat if x is not None])


def _middle_norms(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norms of tensors of some rows, of which float64 copies are cheap."""
    return torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])


def _long_norms(tensors: list[Tensor]) -> Tensor:
    """Return the 2-norms of tensors of many rows each, in float64."""
    flats = [flat for t in tensors if (flat := flat_view(t)) is not None]
    pieces = [cut(flat, flat.numel(), ROW) for flat in flats]
    sums, doubts = zip(*squares_apart(pieces, tensor_squares, row_of), strict=True)
    norms = torch.tensor(sums, dtype=torch.float64, device="cpu").sqrt_()
    for i in np.flatnonzero(doubts):
        norms[i] = exact_norm(tensors[i], 2.0)
    return norms


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
    # `vector_norm` would add the rows one by one, and `sum` adds them in pairs.
    return torch.cat(parts, dim=1).double().square_().sum(dim=1).sqrt_()


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
