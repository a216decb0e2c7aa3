"""The verbs of the pipeline for torch gradients, in place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradclip.backends import TorchArrays, inward
from gradclip.rules import Scope
from gradclip.torch import norms


class InPlace(TorchArrays):
    """Measure tensors and change them where they lie."""

    def measure(self, leaves: Sequence[Tensor], over: Scope, p: float) -> Tensor:
        """Return the norms of the scope in float64."""
        if over == "unit":
            return norms.unit_norms(leaves, p)
        if over == "tensor":
            return norms.tensor_norms(leaves, p)
        return norms.total_norm(leaves, torch.inf if over == "element" else p)

    def multiply(
        self, leaves: Sequence[Tensor], scale: Tensor, over: Scope
    ) -> list[Tensor]:
        """Multiply the tensors by their scale; those that keep it at 1 are not read."""
        if over == "all":
            for dtype in {t.dtype for t in leaves}:
                group = [t for t in leaves if t.dtype == dtype]
                for factor in factors(scale, dtype):
                    torch._foreach_mul_(group, factor)
            return list(leaves)
        scales = self.spread(scale, leaves, over)
        for i in self._to_multiply(leaves, scale, over):
            for factor in factors(scales[i], leaves[i].dtype):
                _times_rows(leaves[i], factor)
        return list(leaves)

    def _to_multiply(
        self, leaves: Sequence[Tensor], scale: Tensor, over: Scope
    ) -> Sequence[int]:
        """Return which tensors have a cell to be scaled, as far as the host knows."""
        if not norms.on_host(leaves):
            return range(len(leaves))
        acted = (scale != 1).nonzero().flatten()
        if over == "unit":
            ends = torch.tensor([self.units(t) for t in leaves]).cumsum(0)
            acted = torch.searchsorted(ends, acted, right=True).unique()
        return [int(i) for i in acted.tolist()]

    def clamp(self, leaves: Sequence[Tensor], limit: Tensor) -> list[Tensor]:
        """Clamp every modulus to the limit."""
        for t in leaves:
            if t.is_complex():
                t.copy_(self.clamped(t, limit))
            else:
                bound = _at_most(limit, t.dtype)
                t.clamp_(-bound, bound)
        return list(leaves)

    def each(
        self, leaves: Sequence[Tensor], scale: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Multiply every element by the scale for its modulus, chunk by chunk."""
        for t in leaves:
            for part in t.split(norms.CHUNK) if t.dim() == 1 else (t,):
                part.copy_(part * scale(part.abs().double()))
        return list(leaves)

    def without_nonfinite(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Set NaN and infinity to 0; a complex number loses both its parts."""
        for t in leaves:
            t.masked_fill_(~t.isfinite(), 0)
        return list(leaves)

    def discard(self, leaves: Sequence[Tensor], finite: Tensor) -> list[Tensor]:
        """Leave the gradients: the clipper keeps them away from the optimizer."""
        return list(leaves)


def factors(scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return what to multiply tensors of a type by, one after the other."""
    eps = torch.finfo(dtype).eps
    scale = inward(scale, eps, torch)
    if eps < 1e-12:
        return [scale]
    if norms.on_host([scale]) and bool((scale < 1e-30).any()):
        # float32 has too few digits left for such a scale, but not for its root.
        return [scale.sqrt().float()] * 2
    return [scale.float()]


def _times_rows(t: Tensor, factor: Tensor) -> None:
    """Multiply by one factor a row, in pieces where the types differ."""
    if factor.dtype == t.real.dtype or factor.numel() == 1 or t.dim() == 0:
        t.mul_(factor if factor.numel() > 1 else factor.reshape(()))
        return
    # Mixed types go through a slow path of torch; through float32 it is 20 times faster.
    rows = max(1, norms.CHUNK // max(1, t[0].numel()))
    for part, scale in zip(t.split(rows), factor.split(rows), strict=True):
        part.copy_(part.float().mul_(scale))


def _at_most(limit: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the limit in a type, rounded so that it is not raised."""
    bound = limit.to(dtype)
    return torch.where(
        bound.double() <= limit, bound, torch.nextafter(bound, torch.zeros_like(bound))
    )
