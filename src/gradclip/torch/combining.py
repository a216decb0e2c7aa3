"""One norm of many float32 norms, without what their rounding had in common.

Float32 rounds some values one way, as it does constants, and a huge element swallows
small ones. Some of the norms are taken in float64 as well: all that are a large part of
the sum of squares, and a sample of the others, which shows what is to be taken away.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Exact: TypeAlias = Callable[[Tensor], Tensor]
"""What returns some of the norms, by ascending numbers, summed in float64."""

NOISE = 4e-8
"""The standard error of a sum of squares, at most: three are half a unit of a norm."""


def combined(
    norms: list[Tensor], counts: list[int], picks: int, exact: Exact
) -> tuple[Tensor, Tensor]:
    """Combine norms into one for each group of `counts` of them, in float64.

    Returns:
        The norm of each group, and whether it is in doubt.
    """
    squares = torch.cat(norms).double().square_()
    sums = _sums(squares, counts)
    heavy = _heavy(squares, sums, counts, picks)
    squares[heavy] = 0
    light = _sums(squares, counts) if len(heavy) else sums
    chosen = _places(squares, light, counts, picks)
    fast, true = squares[chosen], exact(chosen.flatten()).square_().view_as(chosen)
    # Each stands for as large a part of the sum, whatever its own size.
    error, noise = _bias(torch.where(fast > 0, fast / true - 1, 0.0))
    total = light / (1 + error)
    if len(heavy):
        squares.zero_()[heavy] = exact(heavy).square_()
        total += _sums(squares, counts)
    return total.sqrt_(), noise * light > NOISE * sums


def _bias(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean error of each group, as far as it is no accident, and its own.

    The standard error is told by neighbours: what changes slowly was chosen at equal
    steps. A part that none was chosen from may be without the error of all others.
    """
    count = errors.shape[1]
    mean, steps = errors.mean(1), errors.diff(dim=1)
    variance = steps.square_().sum(1) / (2 * count * (count - 1))
    variance += (mean / (2 * count)).square_()
    accident = variance / mean.square()
    mean = torch.where(accident < 1, mean * (1 - accident), 0.0)
    # Where nothing but accident is seen, most of it is not in the whole sum.
    return mean, variance.sqrt_() * torch.where(accident > 1 / 9, 0.5, 1.0)


def _sums(x: Tensor, counts: list[int]) -> Tensor:
    """Return the sum of each group."""
    if len(counts) == 1:
        return x.sum(0, keepdim=True)
    return torch.segment_reduce(x, "sum", lengths=torch.tensor(counts))


def _spread(x: Tensor, counts: list[int]) -> Tensor:
    """Return the number of each group for all of its members."""
    return x if len(counts) == 1 else x.repeat_interleave(torch.tensor(counts))


def _heavy(squares: Tensor, sums: Tensor, counts: list[int], picks: int) -> Tensor:
    """Return where one is so large a part of its sum that a sample could miss it."""
    least = torch.where(sums > 0, sums / picks, torch.inf)
    return (squares >= _spread(least, counts)).nonzero().flatten()


def _places(squares: Tensor, sums: Tensor, counts: list[int], picks: int) -> Tensor:
    """Return some of each group, at equal steps of its sum of squares."""
    steps = torch.arange(0.5, picks, dtype=torch.float64) / picks
    if len(counts) == 1:
        found = torch.searchsorted(squares.cumsum(0), steps * sums)
        return found.clamp_(max=len(squares) - 1).unsqueeze(0)
    sizes = torch.tensor(counts)
    usable = (sums > 0) & (sums < torch.inf)
    # A group of zeros, or with an infinity, must not shift the places of the others.
    even = _spread(torch.where(usable, 0.0, 1 / sizes.double()), counts)
    unit = _spread(torch.where(usable, sums, torch.inf), counts)
    # In place, since each copy of so many would come with new pages of memory.
    shares = (squares / unit).nan_to_num_().add_(even)
    steps = torch.arange(len(sizes)).unsqueeze(1) + steps
    ends = sizes.cumsum(0).unsqueeze(1)
    chosen = torch.searchsorted(torch.cumsum(shares, 0, out=shares), steps)
    return chosen.clamp_(ends - sizes.unsqueeze(1), ends - 1)
