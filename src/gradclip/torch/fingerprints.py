"""What processes tell each other of their parameters, and which of them look alike."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from gradclip.torch.dtensors import local_of
from gradclip.torch.layout import Layout

NEAR = 1e-4
"""Copies may differ by this: not every device rounds the same sum alike twice."""


@dataclass(frozen=True)
class Held:
    """What one process says about one of its parameters."""

    name: str
    shape: tuple[int, ...]
    place: tuple[int, ...]
    """Its number in each group that the parameter is spread over: none for copies."""
    declared: tuple[tuple[int, ...], ...]
    """The ranks of such groups, of those that `split_over` named."""
    whole: bool
    """Whether its norm is that of a tensor which the others know too."""


@dataclass(frozen=True)
class Fingerprint:
    """A parameter of a process, and two norms that tell its numbers from others."""

    rank: int
    held: Held
    norm: float
    largest: float

    @property
    def constant(self) -> bool:
        """Whether all moduli are alike, so that other tensors may look like this."""
        flat = self.largest * math.sqrt(math.prod(self.held.shape))
        return math.isclose(self.norm, flat, rel_tol=1e-6)

    def near(self, other: "Fingerprint") -> bool:
        """Return whether two copies are the same, up to rounding."""
        return close(self.norm, other.norm) and close(self.largest, other.largest)


Pair: TypeAlias = tuple[Fingerprint, Fingerprint]


def close(a: float, b: float) -> bool:
    """Return whether two numbers are equal, up to rounding."""
    # NaN on all processes is nothing that they differ in; the policy judges it.
    return math.isclose(a, b, rel_tol=NEAR) or (math.isnan(a) and math.isnan(b))


def described(
    names: Sequence[str], params: Sequence[Tensor], layout: Layout | None
) -> Iterator[Held]:
    """Yield what this process says about each of its parameters."""
    for i, (name, p) in enumerate(zip(names, params, strict=True)):
        ways = {} if layout is None else layout.ways[i]
        groups = [] if layout is None else layout.groups
        spread = [groups[g] for g, way in sorted(ways.items()) if way.kind != "copy"]
        yield Held(
            name,
            tuple(local_of(p.detach()).shape),
            tuple(group.handle.rank() for group in spread),
            tuple(group.ranks for group in spread if group.level > 0),
            all(way.kind != "other" for way in ways.values()),
        )


def unlike_copies(prints: Sequence[Fingerprint]) -> Iterator[Pair]:
    """Yield gradients that differ though they belong to one and the same piece."""
    first: dict[tuple[str, tuple[int, ...], tuple[int, ...]], Fingerprint] = {}
    for x in prints:
        key = x.held.name, x.held.shape, x.held.place
        reference = first.setdefault(key, x)
        if not x.near(reference):
            yield reference, x


def like_shards(prints: Sequence[Fingerprint]) -> Iterator[Pair]:
    """Yield gradients that are equal though they were declared to be different."""
    first: dict[tuple[object, ...], Fingerprint] = {}
    for x in prints:
        # Zeros are equal anywhere, as in experts that no token has reached.
        for group in x.held.declared if x.norm > 0 else ():
            # To the bit: norms of tensors that differ may come close to each other.
            key = group, x.held.shape, x.norm, x.largest
            reference = first.setdefault(key, x)
            if reference.rank != x.rank:
                yield reference, x


def also_weights(
    a: Fingerprint, b: Fingerprint, of: dict[tuple[int, Held], Fingerprint]
) -> bool:
    """Return whether weights are equal too, and not by accident, as all zeros are."""
    v, w = of[a.rank, a.held], of[b.rank, b.held]
    telling = not (a.constant and v.constant)
    return telling and (v.norm, v.largest) == (w.norm, w.largest)
