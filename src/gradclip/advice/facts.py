"""The facts of one log: each is found when it is asked for, and none is an opinion."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradclip.advice.evidence import (
    dead_from,
    drift_factor,
    level_change,
    lost_from,
    quantile_intervals,
    relapsed_from,
    same_level,
    stands_still,
)
from gradclip.advice.spikes import FEWEST, Spike, find_spikes, warmup_of
from gradclip.record import Floats, Record
from gradclip.rules import Norm, Rule, stages, usable
from gradclip.ruletext import recorded_rule

SHARES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class Lost(NamedTuple):
    """Where a run was lost: from which row on, and how that shows."""

    row: int
    how: str


@dataclass(frozen=True)
class Facts:
    """What is known of the runs that are judged together."""

    record: Record
    norm: Floats
    """The usable norms, in order."""
    warmup: int
    """How many of these are set apart at the start."""

    @cached_property
    def steady(self) -> Floats:
        """The usable norms after the warm-up."""
        return self.norm[self.warmup :]

    @cached_property
    def drift(self) -> float:
        """Median of the last fifth of the steady norms over that of the first."""
        return drift_factor(self.steady)

    @cached_property
    def change(self) -> int:
        """After how many steady norms, behind the start, their level changes."""
        # Between runs, the level may differ.
        change = 0 if self.record.several else level_change(self.steady)
        # What changes within the first fifth is still the start of the run.
        return change if self.warmup + change >= self.norm.size // 5 else 0

    @cached_property
    def quantiles(self) -> dict[float, tuple[float, float, float]]:
        """Share → quantile of the steady norms, and the ends of its interval."""
        if not self.steady.size:
            return {}
        return dict(zip(SHARES, quantile_intervals(self.steady, SHARES), strict=True))

    @cached_property
    def measured(self) -> Rule:
        """The rule that the recorded norms are those of: the first of a chain."""
        return stages(recorded_rule(self.record.rule))[0]

    @cached_property
    def in_force(self) -> float:
        """The limit that was in force all along; NaN if unknown or changing."""
        # Others have limits of tensors or elements, or do not rescale to them.
        plain = isinstance(recorded_rule(self.record.rule), Norm)
        if not plain or self.measured.over != "all":
            return math.nan
        known = self.record.limit[~np.isnan(self.record.limit)]
        constant = known.size and np.all(known == known[0])
        return float(known[0]) if constant else math.nan

    @cached_property
    def still(self) -> bool:
        """Whether the loss ended no lower than it began."""
        return stands_still(self.record.loss)

    @cached_property
    def spikes(self) -> tuple[Spike, ...]:
        """The steps whose norm stands out, in the order of the log."""
        return find_spikes(self.record)

    @property
    def unusable(self) -> int:
        """How many norms are 0, NaN or infinite."""
        return self.record.norm.size - self.norm.size

    @property
    def broken(self) -> bool:
        """Whether most norms say nothing, and not for zeros alone."""
        # Zeros alone break no run: GRPO has many steps without a signal.
        zeros = (self.record.norm == 0).sum()
        return bool(self.unusable > self.record.norm.size / 2 >= zeros)

    @property
    def varies(self) -> bool:
        """Whether the usable norms differ; there has to be one."""
        # Norms that were clipped differ by the 1e-6 that torch adds, and are one value.
        return bool(self.norm.max() > self.norm.min() * (1 + 1e-6))

    @cached_property
    def lost(self) -> Lost:
        """From which row on the run was lost; the number of rows if it was not."""
        size, step = self.record.norm.size, self.record.step
        risen = lost_from(self.record.loss)
        if risen == size:
            risen = self._relapsed()
        dead = dead_from(self.record.norm, self.record.loss)
        if dead < size and dead <= risen and not self.broken:
            bad = ~np.isfinite(self.record.norm[dead:])
            return Lost(dead, f"from step {step[dead]} to the end {_dead_how(bad)}")
        how = "" if risen == size else f"the loss rose for good at step {step[risen]}"
        return Lost(risen, how)

    def _relapsed(self) -> int:
        """Return from which row on a loss was high again, and the norms were others."""
        at, norm = relapsed_from(self.record.loss), self.record.norm
        known, width = usable(norm), norm.size // 10
        parts = slice(max(at - width, 0), at), slice(at, at + width)
        before, after = (norm[part][known[part]] for part in parts)
        # Other data may have a higher loss; a broken model has other norms as well.
        return norm.size if _alike(before, after) else at

    @cached_property
    def healthy(self) -> Floats | None:
        """The usable norms before the run was lost; None if it was not."""
        cut = self.lost.row
        if cut == self.record.norm.size or self.record.several:
            return None
        known = usable(self.record.norm)
        before = self.record.norm[:cut][known[:cut]]
        after = self.record.norm[cut:][known[cut:]]
        # A loss that begins near 0, as that of GRPO, soon rises in a sound run as well;
        # and steps without a signal, which move nothing, have broken no run.
        silent = not self.record.norm[:cut].any()
        early = self.still and before.size < FEWEST
        return None if early and (silent or _alike(before, after)) else before


def facts_of(record: Record) -> Facts:
    """Return the facts of runs that are judged together."""
    known = usable(record.norm)
    return Facts(record, record.norm[known], warmup_of(record, known))


def _dead_how(bad: NDArray[np.bool_]) -> str:
    """Return what a run ends with, by which of its last norms are not finite."""
    if bad.all():
        return "no norm is finite"
    some = "norms are not finite, or 0 with the loss"
    return some if bad.any() else "norm and loss are 0"


def _alike(before: Floats, after: Floats) -> bool:
    """Return whether norms are about as large after something as before it."""
    if not before.size or not after.size:
        return False
    return same_level(float(np.median(before)), float(np.median(after)))
