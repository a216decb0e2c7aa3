"""Norms of torch tensors in float64: no overflow, no error that a float32 could show.

On the host a number is read where that saves work; on other devices, and under
`torch.compile`, nothing is.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.backends import CHUNK

SHORT = 128
"""Elements of float64 that are added one by one."""
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether torch has AVX-512, and the processor most often caches of some megabytes."""
AT_ONCE = CHUNK if WIDE_VECTORS else 4 * CHUNK
"""Elements of half precision that are converted at a time: each call starts threads."""
WIDE = {torch.float64, torch.complex128}
"""Types whose squares float64 may not hold."""
_IS_CPU = attrgetter("is_cpu")


def on_host(tensors: Iterable[Tensor]) -> bool:
    """Return whether numbers can be read without waiting for a device."""
    return not torch.compiler.is_compiling() and all(map(_IS_CPU, tensors))


def at_hand(x: Any) -> bool:
    """Return whether one number can be read without waiting for a device."""
    return not isinstance(x, Tensor) or on_host([x])


def tensor_of(x: Any) -> Tensor:
    """Return a tensor as it is; numbers and arrays on the host, whatever the default.

    `as_tensor` would move a tensor, too, to the default device.
    """
    return x if isinstance(x, Tensor) else torch.tensor(x, device="cpu")


def host_number(x: float, dtype: torch.dtype) -> Tensor:
    """Return a number as a 0-d tensor of float32 or float64, on the host.

    By way of NumPy it takes half as long, and no default device moves it.
    """
    kind = np.float32 if dtype == torch.float32 else np.float64
    return torch.from_numpy(np.array(x, dtype=kind))


class _Scratch(threading.local):
    """Four megabytes for each thread, which all conversions go through.

    A new buffer at each call comes with new pages of memory at each call, and these
    cost more than what is computed on them.
    """

    def __init__(self) -> None:
        """Make a plain tensor, and the first one at once, outside of modes."""
        with torch.inference_mode(False):
            self.wide = torch.empty(2 * CHUNK, dtype=torch.float64, device="cpu")


_SCRATCH = _Scratch()


def scratch(dtype: torch.dtype) -> Tensor:
    """Return room for values of a type, which is valid until the next conversion."""
    return _SCRATCH.wide.view(dtype)


def converted(flat: Tensor, dtype: torch.dtype, unit: int = 1) -> Iterator[Tensor]:
    """Yield a copy of a vector in a type, some whole units at a time.

    The next piece overwrites the one before; both ends stay in the cache.
    """
    most = (AT_ONCE if dtype == torch.float32 else CHUNK) // unit
    units = max(1, flat.numel() // unit)
    # Pieces of one length: a short last one takes almost as long.
    size = math.ceil(units / math.ceil(units / most)) * unit
    room = scratch(dtype)
    for piece in flat.split(size):
        yield room[: piece.numel()].copy_(piece)


def wide_moduli(x: Tensor) -> Tensor:
    """Return the moduli of complex numbers, which float32 would round."""
    return x.to(torch.complex128).abs()


def flat_view(t: Tensor) -> Tensor | None:
    """Return a flat view, in any order since norms do not care; None without one."""
    if t.is_contiguous():
        return t.view(-1)
    dense = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return dense.view(-1) if dense.is_contiguous() else None


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
    # Squares of finite numbers may be infinite, and what is divided by that becomes 0
    # (pytorch#46849).
    usable = largest.isfinite() & (largest > 0)
    unit = torch.where(usable, largest, 1.0)
    norm = unit * torch.linalg.vector_norm(
        moduli / unit, p, dim, keepdim=dim is not None
    )
    norm = torch.where(usable, norm, largest)
    return norm if dim is None else norm.squeeze(dim)


def doubtful(norms: Tensor) -> Tensor:
    """Return where float32 squares may have over- or underflowed on the way."""
    return ~((norms > 1e-10) & (norms < math.inf))


def device_norms(tensors: Sequence[Tensor], p: float) -> Tensor:
    """Return the `p`-norm of each tensor in float64 without reading anything back."""
    first, places = tensors[0], [i for i, t in enumerate(tensors) if _in_list(t)]
    found = {}
    if not torch.compiler.is_compiling():
        # One call for the list, where a call for each takes the host longer.
        listed = [tensors[i] for i in places]
        together = torch._foreach_norm(listed, p, dtype=torch.float64) if listed else ()
        found = dict(zip(places, together, strict=True))
    norms = [
        found[i] if i in found else _device_norm(t, p) for i, t in enumerate(tensors)
    ]
    return torch.stack([norm.to(first.device) for norm in norms])


def _in_list(t: Tensor) -> bool:
    """Return whether a tensor is one whose squares float64 holds, and has elements."""
    return t.dtype.is_floating_point and t.dtype not in WIDE and t.numel() > 0


def _device_norm(t: Tensor, p: float) -> Tensor:
    # Squares of float64 can overflow; those of narrower types fit into float64.
    if t.dtype in WIDE or t.numel() == 0:
        return safe_norm(t, p)
    wide = torch.complex128 if t.is_complex() else torch.float64
    return torch.linalg.vector_norm(t, p, dtype=wide)


def _wide_norm(chunk: Tensor, p: float) -> Tensor:
    """Return the norm of a float64 vector, scaled only where that is needed."""
    if chunk.numel() == 0:
        return chunk.sum()
    low, high = chunk.aminmax()
    largest = torch.maximum(low.abs(), high.abs())
    size = largest.item()
    if math.isinf(p) or size == 0 or not math.isfinite(size):
        return largest
    if p == 2:
        # Between these, float64 holds squares, and sums of as many as there can be.
        usual = 1e-140 < size < 1e140
        return root_of_sum(chunk) if usual else root_of_sum(chunk / largest) * largest
    return (chunk / largest).abs_().pow_(p).sum() ** (1 / p) * largest


def root_of_sum(x: Tensor) -> Tensor:
    """Return the 2-norm of a float64 vector: of short rows, which are added in pairs.

    `dot` and `vector_norm` add one by one: next to an element of 5e7, they lose 4e-12
    of 300,000 that are 1.5, and this does not lose 2e-15.
    """
    size = x.numel() // SHORT * SHORT
    rows = torch.linalg.vector_norm(x[:size].view(-1, SHORT), dim=1)
    return (rows.square_().sum() + x[size:].square().sum()).sqrt_()


def _wide_chunks(t: Tensor) -> Iterator[Tensor]:
    """Yield the moduli of a tensor as short float64 vectors."""
    flat = flat_view(t)
    if flat is None and t.numel() > CHUNK:
        longest = max(range(t.dim()), key=lambda d: t.shape[d])
        # As many of its slices as fit: one after the other takes hours.
        some = max(1, CHUNK * t.shape[longest] // t.numel())
        for part in t.split(some, longest):
            yield from _wide_chunks(part)
        return
    flat = t.reshape(-1) if flat is None else flat
    if flat.is_complex():
        yield from (wide_moduli(chunk) for chunk in flat.split(CHUNK))
    else:
        yield from converted(flat, torch.float64)
