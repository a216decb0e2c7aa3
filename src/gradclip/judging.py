"""From the evidence of a log to a decision: which runs count, which limit, how sure."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradclip.evidence import (
    dead_from,
    drift_factor,
    ends,
    level_change,
    lost_from,
    pile_up,
    quantile_intervals,
    relapsed_from,
    share_above,
    stands_still,
)
from gradclip.record import NOT_TAKEN, Floats, Record, kind_of, no_norms
from gradclip.rules import Norm, Percentile, Rule, stages, usable
from gradclip.ruletext import recorded_rule
from gradclip.spikes import FEWEST, alive, find_spikes
from gradclip.wording import counted, ordinal

SHARES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
FEWEST_BEFORE = 3
"""Norms before a loss that rose; of fewer, the median is but one of them."""
ALIKE = 2
"""Medians that differ by a factor above this are those of different norms."""
INSURANCE, ALWAYS_ON = 0.1, 0.5
DIGITS = 3
"""Of a share: as many as a percentage with one digit behind the point shows."""
# With more norms in memory, a limit that follows a rise lags behind, and clips most.
FOLLOWING = Percentile(q=90.0, window=100)


@dataclass(frozen=True)
class Expert:
    """A limit, or a range of them, by a published rule of thumb."""

    name: str
    limit: float
    clip_rate: float
    source: str


def comparable(record: Record) -> tuple[Record, list[str]]:
    """Return the runs that can be judged together: all alike, or else the newest."""
    record = _of_one_kind(record)
    notes = list(record.notes)
    names = np.unique(record.run)
    if names.size < 2:
        return record, notes
    medians = {}
    for name in names:
        norm = record.norm[record.run == name]
        if usable(norm).sum() >= FEWEST:
            medians[int(name)] = float(np.median(norm[usable(norm)]))
    told = ", ".join(f"{x:.3g}" for x in medians.values())
    if not medians:
        return record, notes
    if short := names.size - len(medians):
        notes.append(
            f"{short} of {names.size} runs have fewer than {FEWEST} usable norms, and "
            "do not count."
        )
    if max(medians.values()) <= ALIKE * min(medians.values()):
        if len(medians) > 1:
            alike = f"the runs are alike (median norms {told}) and count together."
            notes.append(alike)
        return record.take(np.isin(record.run, list(medians))), notes
    newest = max(medians)
    notes.append(
        f"the runs differ (median norms {told}); the advice is for the newest, number "
        f"{newest + 1} of {names.size}."
    )
    return record.of_run(newest), notes


def _of_one_kind(record: Record) -> Record:
    """Leave out runs whose norms are of another order than those of the newest."""
    names = np.unique(record.run).tolist()
    kinds = [kind_of(record.rule_of(name)) for name in names]
    kept = [x for x, kind in zip(names, kinds, strict=True) if kind == kinds[-1]]
    if len(kept) == len(names):
        return record
    rule = record.rule_of(names[-1])
    return record.take(np.isin(record.run, kept)).also(
        f"{len(names) - len(kept)} of {len(names)} runs hold other norms than {rule} "
        "takes, and do not count."
    )


@dataclass
class Facts:
    """The evidence of one log, and the decision that follows from it."""

    record: Record
    norm: Floats
    steady: Floats
    warmup: int
    notes: list[str]

    def __post_init__(self) -> None:
        """Gather the evidence."""
        self.drift = drift_factor(self.steady)
        self.change = self._change()
        self.quantiles = dict(
            zip(SHARES, quantile_intervals(self.steady, SHARES), strict=True)
            if self.steady.size
            else ()
        )
        self.measured = stages(recorded_rule(self.record.rule))[0]
        # Others have limits of tensors or elements, or do not rescale to them.
        plain = isinstance(recorded_rule(self.record.rule), Norm)
        whole = plain and self.measured.over == "all"
        self.in_force = _in_force(self.record.limit) if whole else math.nan
        self.still = stands_still(self.record.loss)
        self.lost_at, self.lost_how = self._lost()
        self.spikes = find_spikes(self.record)
        self._note_gaps()
        self._note_oddities()
        self._note_phases()

    def _lost(self) -> tuple[int, str]:
        """Return from which row on the run was lost, and how that shows."""
        risen = lost_from(self.record.loss)
        if risen == self.record.norm.size:
            risen = self._relapsed()
        dead = dead_from(self.record.norm, self.record.loss)
        if dead < self.record.norm.size and dead <= risen and not self._broken():
            bad = ~np.isfinite(self.record.norm[dead:])
            told = f"from step {self.record.step[dead]} to the end"
            return dead, f"{told} {_dead_how(bad)}"
        step = self.record.step[risen : risen + 1]
        return risen, f"the loss rose for good at step {step[0]}" if step.size else ""

    def _relapsed(self) -> int:
        """Return from which row on a loss was high again, and the norms were others."""
        at, norm = relapsed_from(self.record.loss), self.record.norm
        known, width = usable(norm), norm.size // 10
        parts = slice(max(at - width, 0), at), slice(at, at + width)
        before, after = (norm[part][known[part]] for part in parts)
        # The loss of other data may be higher, and that of a broken model has others.
        return norm.size if _alike(before, after) else at

    def _broken(self) -> bool:
        """Return whether most norms say nothing, and not for zeros alone."""
        size, bad = self.record.norm.size, self.record.norm.size - self.norm.size
        # Zeros alone break no run: GRPO has many steps without a signal.
        return bool(bad > size / 2 >= (self.record.norm == 0).sum())

    def _change(self) -> int:
        """Return after how many steady norms, behind the start, their level changes."""
        # Between runs, the level may differ.
        change = 0 if self.record.several else level_change(self.steady)
        # What changes within the first fifth is still the start of the run.
        return change if self.warmup + change >= self.norm.size // 5 else 0

    def _note_gaps(self) -> None:
        gaps = np.diff(self.record.step)
        gaps = gaps[gaps > 0]
        # The median: a hole in the log is not its rhythm.
        gap = int(np.median(gaps)) if gaps.size else 1
        if gap > 1:
            self.notes.append(
                f"the log has every {ordinal(gap)} step: spikes between them are not "
                "in it, and some loggers write the mean since the last line."
            )

    def _note_oddities(self) -> None:
        size = self.record.norm.size
        if zeros := int((alive(self.record) & (self.record.norm == 0)).sum()):
            self.notes.append(
                f"{zeros} of {size} norms are exactly 0: steps without a signal, which "
                "are left out of the quantiles."
            )
        if left := int((self.record.norm == NOT_TAKEN).sum()):
            self.notes.append(
                f"{left} of {size} norms are {NOT_TAKEN}, as loggers write where none "
                "was taken, and are left out."
            )
        if bad := int((~np.isfinite(self.record.norm)).sum()):
            self.notes.append(f"{bad} of {size} norms are NaN or infinite.")
        # Of a run that was lost, the reasons say more.
        if self.still and self.healthy is None:
            before, after = ends(self.record.loss)
            self.notes.append(
                "the loss ended no lower than it began, or less than 2 % (the median "
                f"of its first tenth is {before:.4g}, of its last {after:.4g}): the "
                "norms of a run that does not learn say little about one that does."
            )

    def _note_phases(self) -> None:
        if self.warmup:
            first = np.median(self.norm[: self.warmup])
            self.notes.append(
                f"the first {self.warmup} norms (median {first:.3g}) are a phase of "
                f"their own and are set apart from the rest "
                f"(median {np.median(self.steady):.3g})."
            )
        if self.change:
            steps = self.record.step[usable(self.record.norm)]
            before, after = self.steady[: self.change], self.steady[self.change :]
            self.notes.append(
                f"the level of the norms changes at step "
                f"{steps[self.warmup + self.change]} (median {np.median(before):.3g} "
                f"before, {np.median(after):.3g} after): one limit for both may fit "
                "neither."
            )

    @property
    def healthy(self) -> Floats | None:
        """The norms before the run was lost; None if it was not."""
        cut = self.lost_at
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

    def refusal(self) -> str:
        """Return why norms of a run that was not lost say nothing; empty if they do."""
        size, bad = self.record.norm.size, self.record.norm.size - self.norm.size
        if self._broken():
            return (
                f"{bad} of {size} norms are 0, NaN or infinite: the run is broken, and "
                "no limit mends that. Look at the loss where it began."
            )
        if self.norm.size < FEWEST:
            return (
                f"{counted(self.norm.size, 'usable norms are')} too few; record at "
                f"least {FEWEST}, better a few hundred steps."
            )
        if not self._varies():
            return f"every norm is {self.norm[0]:.4g}: such a log says nothing."
        return ""

    def _no_norms(self) -> str:
        """Return why the numbers are no norms of gradients before clipping."""
        if self.measured.over == "element":
            return (
                f"{self.record.rule} looks at each element, and what it recorded is "
                "the largest modulus. Record norms with Norm(float('inf'))."
            )
        if why := no_norms(self.record.norm):
            return why
        varies = self.norm.size >= FEWEST and self._varies()
        # Norms that are all alike sit at the largest, too, and are refused for that.
        if varies and (share := pile_up(self.norm)) > 0.1:
            return (
                f"{share:.0%} of the norms sit at the largest, {self.norm.max():.4g}: "
                "these are norms after clipping. Log the norm before it, which "
                "clip_grad_norm_ returns."
            )
        return ""

    def _varies(self) -> bool:
        # Norms that were clipped differ by the 1e-6 that torch adds, and are one value.
        return bool(self.norm.max() > self.norm.min() * (1 + 1e-6))

    def decide(self) -> tuple[float | None, Rule | None, str, list[str]]:
        """Return limit, rule, confidence and the reasons."""
        before = self.healthy
        few = self.refusal() if before is None else _too_few(before, self.lost_how)
        if why := self._no_norms() or few:
            return None, None, "none", [why]
        if before is not None:
            return self._before_it_was_lost(before)
        limit, reason = self._limit()
        reasons = [reason]
        rule: Rule = Norm(limit, p=self.measured.p)
        # Where the limit in force fits, there is nothing to change, whatever the drift.
        if limit != self.in_force and not 1 / 3 < self.drift < 3:
            drifting = (
                f"the norms drift by a factor of {self.drift:.2g} from the first fifth "
                "to the last, so that no fixed limit fits the whole run"
            )
            # What follows takes 2-norms.
            if self.measured.p == 2:
                rule, reasons = FOLLOWING, [f"{drifting}: let it follow the norms."]
            else:
                reasons.append(f"{drifting}.")
        reasons += self._on_the_run()
        return limit, rule, self._confidence(), reasons

    def _before_it_was_lost(self, before: Floats) -> tuple[float, Rule, str, list[str]]:
        """Return what little a run says that was lost: the norms before."""
        limit = rounded_up(float(np.median(before)))
        reason = (
            f"{self.lost_how}, so that the later norms are those of a broken model: "
            f"{limit:g} is the median of the {counted(before.size, 'norms')} before. "
            "Run again with it, and ask again."
        )
        return limit, Norm(limit, p=self.measured.p), "low", [reason]

    def _limit(self) -> tuple[float, str]:
        """Return a limit just above the typical norm, and why this one."""
        if self._in_force_fits():
            return self.in_force, (
                f"{self.in_force:g} was in force and is just above the typical norm: "
                "there is nothing to change."
            )
        # Never past the next norms: of narrow ones, two digits would clip none.
        digits = (rounded_up(self.quantiles[0.9][0], n) for n in range(2, 7))
        limit = next((x for x in digits if x <= self.quantiles[0.95][0]), None)
        limit = limit or self.quantiles[0.9][0]
        return limit, (
            f"{limit:g} is the 90th percentile of the norms"
            f"{' after the warm-up' if self.warmup else ''}: just above the typical "
            "norm, so that clipping stays the exception."
        )

    def _in_force_fits(self) -> bool:
        """Return whether the run's own limit was insurance, and not out of reach."""
        rate = float(np.mean(self.steady > self.in_force))
        insures = regime(rate) == "insurance"
        return insures and self.in_force <= 3 * self.quantiles[0.5][0]

    def _on_the_run(self) -> list[str]:
        """Say how the run was clipped, where the log tells."""
        scale = self.record.scale[np.isfinite(self.record.scale)]
        # Norm(inf) only recorded: that nothing was clipped is no finding.
        if not scale.size or np.isposinf(self.record.limit).all():
            return []
        # A rule that stretches acts as well.
        rate = float(np.mean(scale != 1))
        known = math.isfinite(self.in_force)
        if not rate:
            which = f", {self.in_force:g}," if known else ""
            return [f"the limit in force{which} never acted."]
        at = f" at {self.in_force:g}" if known else ""
        told = f"the run was clipped{at} on {percent(rate)} of its steps"
        if rate > ALWAYS_ON:
            return [
                f"{told}: there the limit only sets the length of the step, and the "
                "learning rate is the lever. With a higher limit, lower the learning "
                "rate unless the optimizer ignores scale, as Adam does."
            ]
        return [f"{told}, which is {regime(rate)}."]

    def _confidence(self) -> str:
        if self.still:
            return "low"
        _, low, high = self.quantiles[0.9]
        sure = high / low < 1.15 and 1 / 3 < self.drift < 3 and not self.change
        # Runs that repeat each other do not add up to a longer one.
        known = usable(self.record.norm)
        longest = int(np.bincount(self.record.run[known]).max()) - self.warmup
        if longest >= 1000 and sure:
            return "high"
        return "medium" if longest >= 100 and high / low < 2 else "low"

    def experts(self) -> tuple[Expert, ...]:
        """Return the published rules of thumb, with what they would clip."""
        if not self.steady.size:
            return ()
        ordered = np.sort(self.steady)
        # Of norms near 1e308, the sum overflows.
        mean = float(np.mean(ordered / ordered[-1]) * ordered[-1])
        median = float(np.median(self.steady))
        rows = (
            ("half the mean", mean / 2, "Pascanu 2013, lower end"),
            ("ten times the mean", mean * 10, "Pascanu 2013, upper end"),
            ("90th percentile", float(np.quantile(ordered, 0.9)), "tuning playbook"),
            ("twice the median", 2 * median, "icefall"),
            ("10th percentile", float(np.quantile(ordered, 0.1)), "AutoClip 2020"),
        )
        return tuple(
            Expert(name, limit, float(share_above(ordered, limit)), source)
            for name, limit, source in rows
        )


def _dead_how(bad: NDArray[np.bool_]) -> str:
    """Return what a run ends with, by which of its last norms are not finite."""
    if bad.all():
        return "no norm is finite"
    told = "norms are not finite, or 0 with the loss"
    return told if bad.any() else "norm and loss are 0"


def _too_few(before: Floats, how: str) -> str:
    """Return why the norms before a run was lost say nothing; empty if they do."""
    if before.size >= FEWEST_BEFORE:
        return ""
    told = (
        f"of the {counted(before.size, 'norms')} before the median says nothing"
        if before.size
        else "no norm before that is usable"
    )
    return (
        f"{how}, and {told}; at least {FEWEST_BEFORE} are needed. "
        "Lower the learning rate until the loss falls, and ask again."
    )


def _alike(before: Floats, after: Floats) -> bool:
    """Return whether norms are about as large after something as before it."""
    if not before.size or not after.size:
        return False
    medians = float(np.median(before)), float(np.median(after))
    return max(medians) <= ALIKE * min(medians)


def _in_force(limit: Floats) -> float:
    """Return the limit that was in force all along; NaN if unknown or changing."""
    known = limit[~np.isnan(limit)]
    return float(known[0]) if known.size and np.all(known == known[0]) else math.nan


def regime(rate: float) -> str:
    """Return what clipping is, by the share of steps that it acts on.

    Example:
        >>> regime(0.1003), regime(0.101), regime(0.9)
        ('insurance', 'in between', 'always on')
    """
    # As it is told: 10.0% is a tenth, whatever was rounded off.
    rate = round(rate, DIGITS)
    if rate <= INSURANCE:
        return "insurance"
    return "always on" if rate > ALWAYS_ON else "in between"


def percent(rate: float) -> str:
    """Return a share above 0 as it is told, with a digit behind the point if it counts.

    Example:
        >>> percent(1.0), percent(0.1003), percent(0.104), percent(0.0001)
        ('100%', '10%', '10.4%', 'less than 0.1%')
    """
    if round(rate, DIGITS) == 0:
        return "less than 0.1%"
    return f"{rate:.1%}".replace(".0%", "%")


def rounded_up(value: float, digits: int = 2) -> float:
    """Return the next number with the two digits that a limit deserves, or more.

    Example:
        >>> rounded_up(1.234), rounded_up(0.5), rounded_up(1961.0)
        (1.3, 0.5, 2000.0)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    # 0.14 / 0.01 is a little above 14, which would be rounded up to 0.15.
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}")
