"""The verbs of the pipeline for torch gradients, in place."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.backends import CHUNK, Scaling, TorchArrays, at_most, inward
from gradclip.backends.narrow import home
from gradclip.decision import Info
from gradclip.rules import Rule, Scope, State
from gradclip.scalars import NUMBERS, Scalars
from gradclip.torch import norms
from gradclip.torch.constants import sent
from gradclip.torch.exact import WIDE_VECTORS, at_hand, host_number, on_host, safe_norm

CPU = torch.device("cpu")


class InPlace(TorchArrays):
    """Measure tensors and change them where they lie.

    Args:
        amplified: How many times too large the tensors are, as those of a loss scaled
            for half precision; norms and limits are those without it.
        cells: For gradients of which some are missing: how many parameters there are,
            and which of them have one.
        fused: Whether a common factor may be left to the optimizer: it is kept in
            `amplified` then, and the tensors stay as they are.
    """

    def __init__(
        self,
        amplified: Tensor | None = None,
        cells: tuple[int, list[int]] | None = None,
        fused: bool = False,
    ) -> None:
        """Keep what differs from plain gradients."""
        super().__init__()
        self.amplified, self.cells, self.fused = amplified, cells, fused
        self.deterministic = False
        # What stands for a tensor without a gradient on any process.
        self.missing = 0.0
        self.lender: Callable[[Rule, int, Tensor], tuple[Rule, State]] | None = None

    def measure(self, leaves: Sequence[Tensor], over: Scope, p: float) -> Tensor:
        """Return the norms of the scope in float64; NaN for missing tensors."""
        norm = self.weigh(leaves, over, p)
        if self.deterministic:
            norm = norms.rounded(norm)
        return norm if self.amplified is None else norm / self.amplified.double()

    def weigh(self, weights: Sequence[Tensor], over: Scope, p: float) -> Tensor:
        """Return the norms of parameters, which no loss scale has enlarged."""
        if over == "unit":
            return self.per_unit(weights, p)
        if over != "tensor":
            return self.total(weights, math.inf if over == "element" else p)
        found = self.per_tensor(weights, p)
        if self.cells is None:
            return found
        count, present = self.cells
        return found.new_full((count,), math.nan).index_copy(
            0, sent(present, found.device), found
        )

    def total(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        """Return the norm of all tensors together, in float64."""
        if self.deterministic:
            return safe_norm(norms.wide_norms(tensors, p), p)
        return norms.total_norm(tensors, p)

    def per_tensor(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        """Return the norm of each tensor, in float64."""
        measure = norms.wide_norms if self.deterministic else norms.tensor_norms
        return measure(tensors, p)

    def per_unit(self, tensors: Sequence[Tensor], p: float) -> Tensor:
        """Return the norm of each row, in float64."""
        measure = norms.wide_unit_norms if self.deterministic else norms.unit_norms
        return measure(tensors, p)

    def counts(self, leaves: Sequence[Tensor]) -> list[int]:
        """Return how many units each tensor has, 0 for one without a gradient."""
        found = super().counts(leaves)
        if self.cells is None:
            return found
        count, present = self.cells
        here = dict(zip(present, found, strict=True))
        return [here.get(i, 0) for i in range(count)]

    def absent(self, device: torch.device) -> Tensor | None:
        """Return which parameters have no gradient, if any."""
        if self.cells is None:
            return None
        absent = np.ones(self.cells[0], dtype=bool)
        absent[self.cells[1]] = False
        return sent(absent, home(device))

    def multiply(
        self, leaves: Sequence[Tensor], scale: Tensor, over: Scope
    ) -> list[Tensor]:
        """Multiply the tensors by their scale; those that keep it at 1 are not read."""
        if over == "all":
            if not (self.fused and self._leave_to_optimizer(leaves, scale)):
                _multiply_all(leaves, scale)
            return list(leaves)
        if over == "tensor" and self.cells is not None:
            scale = scale[sent(self.cells[1], scale.device)]
        chosen = self._to_multiply(leaves, scale, over)
        sizes = [self.units(t) if over == "unit" else 1 for t in leaves]
        ends = list(accumulate(sizes))
        # How far a factor is rounded inward depends on the type that it multiplies.
        for dtype in {t.dtype for t in leaves}:
            group = [i for i in chosen if leaves[i].dtype == dtype]
            whole = [i for i in group if over == "tensor" or leaves[i].dim() < 2]
            cut = [] if over == "tensor" else [i for i in group if leaves[i].dim() > 1]
            for factor in factors(scale, dtype) if group else ():
                if whole:
                    # Indexed by a list, which would have to be sent, a device waits.
                    each = factor.unbind() if over == "tensor" else factor
                    single = [each[ends[i] - 1] for i in whole]
                    torch._foreach_mul_([leaves[i] for i in whole], single)
                for i in cut:
                    _times_units(leaves[i], factor[ends[i] - sizes[i] : ends[i]])
        return list(leaves)

    def _leave_to_optimizer(self, leaves: Sequence[Tensor], scale: Any) -> bool:
        """Divide the amplification by the scale, if float32 can hold the result."""
        eps = [torch.finfo(dtype).eps for dtype in {t.dtype for t in leaves}]
        if min(eps) < 1e-12:
            # The optimizer would take the factor in float32.
            return False
        # One factor serves all types, so that the coarsest decides how it is rounded.
        scale = inward(scale, max(eps), self.xp)
        before = 1.0 if self.amplified is None else self.amplified.double()
        amplified = before / scale
        if at_hand(amplified) and not 1e-30 < amplified < 1e30:
            return False
        alone = isinstance(amplified, float)
        self.amplified = host_number(amplified, torch.float64) if alone else amplified
        return True

    def _to_multiply(
        self, leaves: Sequence[Tensor], scale: Tensor, over: Scope
    ) -> Sequence[int]:
        """Return which tensors have a cell to be scaled, as far as the host knows."""
        if not on_host(leaves):
            return range(len(leaves))
        acted = (scale != 1).nonzero().flatten()
        if over == "unit":
            ends = torch.tensor([self.units(t) for t in leaves], device="cpu").cumsum(0)
            acted = torch.searchsorted(ends, acted, right=True).unique()
        return [int(i) for i in acted.tolist()]

    def places(self, leaves: Sequence[Tensor]) -> Sequence[int]:
        """Return which parameters the gradients belong to."""
        return super().places(leaves) if self.cells is None else self.cells[1]

    def inside(self, x: Tensor, over: Scope) -> tuple[Tensor, Scaling]:
        """Return moduli or singular values, and how to scale them in place."""
        parts, put = super().inside(x, over)
        if self.amplified is not None:
            parts = parts / self.amplified.to(parts.dtype)
        # `put` scales what is still amplified, for which the ratio is the same.
        return parts, lambda scale: x.copy_(put(scale))

    def borrow(self, stage: Rule, place: int, parts: Tensor) -> tuple[Rule, State]:
        """Return a rule with the memory of the optimizer, if there is one."""
        lender = self.lender or super().borrow
        return lender(stage, place, parts)

    def clamp(self, leaves: Sequence[Tensor], limit: Tensor) -> list[Tensor]:
        """Clamp every modulus to the limit."""
        # To divide the gradients instead would take another pass over memory.
        limit = limit if self.amplified is None else limit * self.amplified
        for t in leaves:
            if t.is_complex():
                t.copy_(self.clamped(t, limit))
            else:
                bound = at_most(limit, t.dtype, self.xp)
                t.clamp_(-bound, bound)
        return list(leaves)

    def each(
        self, leaves: Sequence[Tensor], scale: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Multiply every element by the scale for its modulus, some at a time."""
        for t in leaves:
            for part in _pieces(t):
                moduli = self.moduli(part)
                if self.amplified is not None:
                    moduli /= self.amplified
                part.copy_(part * scale(moduli))
        return list(leaves)

    def without_nonfinite(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Set NaN and infinity to 0; a complex number loses both its parts."""
        for t in leaves:
            for part in _pieces(t):
                part.masked_fill_(~part.isfinite(), 0)
        return list(leaves)

    def discard(self, leaves: Sequence[Tensor], finite: Tensor) -> list[Tensor]:
        """Leave the gradients: who steps the optimizer knows how to skip a step."""
        return list(leaves)

    def known(self, flag: Tensor) -> bool | None:
        """Return the flag where no other device has to be waited for."""
        return bool(flag) if on_host([flag]) else None

    def quiet(self) -> AbstractContextManager[Any]:
        """Return what keeps a library from warnings of what rules count on."""
        return nullcontext()


class OneNumber(InPlace):
    """The verbs where one norm decides, and that is on the host: a number of NumPy.

    Rules say the same on it, in a fifth of the time that torch takes for 0-d tensors.
    """

    def __init__(self, amplified: Tensor | None = None, fused: bool = False) -> None:
        """Take the namespace of single numbers."""
        super().__init__(amplified, fused=fused)
        # What it keeps of arrays is not for threads.
        self.xp = Scalars()

    def measure(self, leaves: Sequence[Tensor], over: Scope, p: float) -> Any:
        """Return the norm of everything, read."""
        norm = np.float64(norms.host_total(leaves, p))
        return norm if self.amplified is None else norm / self.amplified.item()

    def quiet(self) -> AbstractContextManager[Any]:
        """Return a context in which NumPy takes infinity and NaN as torch does."""
        return np.errstate(all="ignore")

    def adopt(self, x: Any, norm: Any) -> Any:
        """Return an array of a memory in NumPy; what is 0-d as a number."""
        return np.asarray(x.cpu() if isinstance(x, Tensor) else x)[()]

    def number(self, x: Any) -> Any:
        """Return what a schedule said as a number."""
        return np.float64(x)

    def known(self, flag: Any) -> bool | None:
        """Return the flag, which is on the host."""
        return bool(flag)

    def count_nonfinite(self, x: Tensor) -> int:
        """Return how many elements of a tensor, no number, are NaN or infinite."""
        return int((~x.isfinite()).sum())


def in_tensors(info: Info) -> Info:
    """Return a report of single numbers in tensors, made in a few calls."""
    lengths = [info.norm, info.limit, info.scale, info.norm_after]
    flags = [info.finite, info.clipped, info.kept]
    norm, limit, scale, after = torch.from_numpy(np.array(lengths)).unbind()
    finite, clipped, kept = torch.from_numpy(np.array(flags)).unbind()
    skipped = torch.from_numpy(np.array(info.skipped))
    return Info(norm, limit, scale, finite, clipped, after, skipped, kept)


def factors(scale: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return what to multiply tensors of a type by, one after the other."""
    eps = torch.finfo(dtype).eps
    if number := isinstance(scale, float):
        scale = inward(np.float64(scale), eps, NUMBERS)
        far = not 1e-30 <= scale <= 1e30
    else:
        scale = inward(scale, eps, torch)
        far = on_host([scale]) and bool(((scale < 1e-30) | (scale > 1e30)).any())

    def to_tensor(x: Any, dtype: torch.dtype) -> Tensor:
        return host_number(x, dtype) if number else x.to(dtype)

    if eps < 1e-12:
        return [to_tensor(scale, torch.float64)]
    if far:
        # float32 has too few digits left for such a scale, but not for its root.
        return [to_tensor(scale**0.5, torch.float32)] * 2
    return [to_tensor(scale, torch.float32)]


def _multiply_all(leaves: Sequence[Tensor], scale: Any) -> None:
    """Multiply all tensors by one scale, one call for each type and device."""
    dtypes = set(map(attrgetter("dtype"), leaves))
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    if len(dtypes) == 1 and at_hand(scale):
        groups[dtypes.pop(), CPU] = list(leaves)
    else:
        for t in leaves:
            groups.setdefault((t.dtype, t.device), []).append(t)
    for (dtype, device), group in groups.items():
        large: list[Tensor] = []
        # With AVX-512, torch is slow to multiply bfloat16 from memory.
        if dtype == torch.bfloat16 and WIDE_VECTORS and on_host(group):
            large = list(filter(_slow_from_memory, group))
            group = [t for t in group if not _slow_from_memory(t)]
        for factor in factors(scale, dtype):
            factor = factor.to(device)
            if group:
                torch._foreach_mul_(group, factor)
            for t in large:
                _times_from_cache(t, factor)


def _slow_from_memory(t: Tensor) -> bool:
    """Return whether a tensor of bfloat16 is large, and plain enough to be cut."""
    return t.numel() >= CHUNK and type(t) is Tensor and t.is_contiguous()


def _times_from_cache(t: Tensor, factor: Tensor) -> None:
    """Multiply a large tensor of bfloat16 on the host.

    From memory, torch takes two to four times as long to multiply as to copy, and from
    the cache it does not: with AVX-512, and without it the product takes less.
    """
    for piece in t.view(-1).split(CHUNK):
        torch.mul(piece.clone(), factor, out=piece)


def _pieces(t: Tensor) -> Sequence[Tensor]:
    """Return views that cover a tensor, so that temporary copies stay small."""
    if t.dim() == 0:
        return [t]
    rows = max(1, CHUNK // max(1, math.prod(t.shape[1:])))
    return t.split(rows)


def _times_units(t: Tensor, factors: Tensor) -> None:
    """Multiply each unit of a tensor by its factor."""
    factor = factors.view(-1, *[1] * (t.dim() - 1))
    if factor.dtype == t.real.dtype:
        t.mul_(factor)
    else:
        # Torch is slow with mixed types: by way of float32 it takes a 20th.
        pieces = _pieces(t)
        for part, scale in zip(pieces, factor.split(len(pieces[0])), strict=True):
            part.copy_(part.float().mul_(scale))
