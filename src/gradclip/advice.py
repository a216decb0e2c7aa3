"""Where the threshold belongs, told from the norms of a run, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gradclip.evidence import (
    SPIKE,
    drift_factor,
    lost_from,
    pile_up,
    quantile_intervals,
    share_above,
    spike_scores,
    tail_index,
    transient_length,
)
from gradclip.history import History, is_finite
from gradclip.record import Floats, Record
from gradclip.replaying import Replay as Replay
from gradclip.replaying import replay as replay
from gradclip.rules import Norm, Percentile, Rule

SHARES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
FEWEST = 20
INSURANCE, ALWAYS_ON = 0.1, 0.5


@dataclass(frozen=True)
class Spike:
    """A step whose norm stands out from those around it."""

    step: int
    norm: float
    score: float
    """The robust z-score of the log norm; infinity for a norm that is not finite."""
    tensors: tuple[tuple[str, float], ...] = ()
    """The parameters that carried it, with their norms; where they were recorded."""


@dataclass(frozen=True)
class Expert:
    """A limit, or a range of them, by a published rule of thumb."""

    name: str
    limit: float
    clip_rate: float
    source: str


@dataclass(frozen=True)
class Advice:
    """What `advise` found out; `print` it for the whole text."""

    limit: float | None
    """The recommended limit; None where the log does not support one."""
    rule: Rule | None
    """The recommended rule; None where the log does not support one."""
    confidence: str
    """`"high"`, `"medium"`, `"low"` or `"none"`."""
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    steps: int
    nonfinite: int
    zeros: int
    warmup: int
    """How many recorded steps at the start were set apart."""
    quantiles: dict[float, tuple[float, float, float]]
    """Share → quantile, low and high end of its 95 % interval, after the warm-up."""
    spikes: tuple[Spike, ...]
    drift: float
    """Median of the last fifth over that of the first."""
    tail: float
    """Hill's tail index; at 2 or below the norms have no variance."""
    experts: tuple[Expert, ...]
    in_force: float
    """The limit that the run was clipped with; NaN where the log does not tell."""
    _ordered: Floats = field(repr=False)
    _steady: Floats = field(repr=False)

    @property
    def code(self) -> str:
        """The line to paste; empty where there is no recommendation."""
        return f"attach(optimizer, {call(self.rule)})" if self.rule else ""

    @property
    def regime(self) -> str:
        """What clipping at the recommended limit is: by how often it acts."""
        if self.limit is None:
            return "unknown"
        return regime(self.clip_rate(self.limit, after_warmup=True))

    def clip_rate(self, limit: float, after_warmup: bool = False) -> float:
        """Return the share of the recorded steps whose norm is above a limit.

        Args:
            limit: In the unit of the norms.
            after_warmup: Leave out the steps that were set apart.

        Returns:
            A share of the finite norms, between 0 and 1.
        """
        ordered = self._steady if after_warmup else self._ordered
        return float(share_above(ordered, limit))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it: NaN and infinity are null."""
        facts = {name: getattr(self, name) for name in _FACTS}
        facts["rule"] = call(self.rule) if self.rule else None
        facts["clip_rate"] = self.clip_rate(self.limit) if self.limit else None
        facts["quantiles"] = {str(q): list(x) for q, x in self.quantiles.items()}
        facts["spikes"] = [asdict(spike) for spike in self.spikes]
        facts["experts"] = [asdict(expert) for expert in self.experts]
        return {name: _jsonable(x) for name, x in facts.items()}

    def __str__(self) -> str:
        """Tell it all, the recommendation first."""
        from gradclip.telling import tell

        return tell(self)


_FACTS = (
    "limit",
    "rule",
    "code",
    "confidence",
    "regime",
    "reasons",
    "notes",
    "steps",
    "nonfinite",
    "zeros",
    "warmup",
    "drift",
    "tail",
    "in_force",
)


def advise(history: History) -> Advice:
    """Tell from a run's norms where to put the threshold, and how sure that is.

    Args:
        history: Norms before clipping, of one run or of several alike.

    Returns:
        The advice. Its limit is None where the log does not support one, and the
        reasons say why.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> norms = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
        >>> norms[700] = 50.0
        >>> advice = gc.advise(gc.History.of(norms))
        >>> advice.code, [spike.step for spike in advice.spikes]
        ('attach(optimizer, Norm(1.5))', [700])
        >>> round(advice.clip_rate(advice.limit), 2), advice.confidence
        (0.09, 'high')
    """
    record = history.recorded
    record, notes = _comparable(record)
    usable = is_finite(record.norm)
    norm = record.norm[usable]
    warmup = _warmup(record, usable)
    steady = norm[warmup:]
    facts = _Facts(record, norm, steady, warmup, notes)
    limit, rule, confidence, reasons = facts.decide()
    return Advice(
        limit=limit,
        rule=rule,
        confidence=confidence,
        reasons=tuple(reasons),
        notes=tuple(facts.notes),
        steps=int(record.norm.size),
        nonfinite=int((~np.isfinite(record.norm)).sum()),
        zeros=int((record.norm == 0).sum()),
        warmup=warmup,
        quantiles=facts.quantiles,
        spikes=facts.spikes,
        drift=facts.drift,
        tail=tail_index(steady),
        experts=facts.experts(),
        in_force=facts.in_force,
        _ordered=np.sort(record.norm[np.isfinite(record.norm)]),
        _steady=np.sort(steady),
    )


def _comparable(record: Record) -> tuple[Record, list[str]]:
    """Return the runs that can be judged together: all alike, or else the newest."""
    notes = list(record.notes)
    names = np.unique(record.run)
    if names.size < 2:
        return record, notes
    medians = {}
    for name in names:
        norm = record.norm[record.run == name]
        if is_finite(norm).sum() >= FEWEST:
            medians[int(name)] = float(np.median(norm[is_finite(norm)]))
    told = ", ".join(f"{x:.3g}" for x in medians.values())
    if not medians:
        return record, notes
    if max(medians.values()) <= 2 * min(medians.values()):
        notes.append(f"the runs are alike (median norms {told}) and count together.")
        return record.take(np.isin(record.run, list(medians))), notes
    newest = max(medians)
    notes.append(
        f"the runs differ (median norms {told}); the advice is for the newest, number "
        f"{newest + 1} of {names.size}."
    )
    return record.take(record.run == newest), notes


def _warmup(record: Record, usable: Any) -> int:
    """Return how long the first run's warm-up is; more runs are not cut."""
    if np.unique(record.run).size > 1:
        return 0
    return transient_length(record.norm[usable])


@dataclass
class _Facts:
    """The evidence of one log, and the decision that follows from it."""

    record: Record
    norm: Floats
    steady: Floats
    warmup: int
    notes: list[str]

    def __post_init__(self) -> None:
        self.drift = drift_factor(self.steady)
        self.quantiles = dict(
            zip(SHARES, quantile_intervals(self.steady, SHARES), strict=True)
            if self.steady.size
            else ()
        )
        self.in_force = _in_force(self.record.limit)
        self.spikes = find_spikes(self.record)
        self._note_gaps()
        self._note_oddities()

    def _note_gaps(self) -> None:
        gaps = np.diff(self.record.step)
        gaps = gaps[gaps > 0]
        gap = int(np.median(gaps)) if gaps.size else 1
        if gap > 1:
            self.notes.append(
                f"the log has every {gap}th step: spikes between them are not in it, "
                "and some loggers write the mean since the last line."
            )

    def _note_oddities(self) -> None:
        size = self.record.norm.size
        if zeros := int((self.record.norm == 0).sum()):
            self.notes.append(
                f"{zeros} of {size} norms are exactly 0: steps without a signal, which "
                "are left out of the quantiles."
            )
        if bad := int((~np.isfinite(self.record.norm)).sum()):
            self.notes.append(f"{bad} of {size} norms are NaN or infinite.")
        if self.warmup:
            before = np.median(self.norm[: self.warmup])
            self.notes.append(
                f"the first {self.warmup} norms (median {before:.3g}) are a phase of "
                f"their own and are set apart from the rest "
                f"(median {np.median(self.steady):.3g})."
            )

    @property
    def healthy(self) -> Floats:
        """The norms before the loss rose for good; empty for a run that was not lost."""
        cut = lost_from(self.record.loss)
        if cut == self.record.norm.size or np.unique(self.record.run).size > 1:
            return self.norm[:0]
        before = self.record.norm[:cut]
        return before[is_finite(before)]

    def refusal(self) -> str:
        """Return why the log supports no limit; empty if it does."""
        size, bad = self.record.norm.size, self.record.norm.size - self.norm.size
        if size and bad > size / 2 and not (self.record.norm == 0).sum() > size / 2:
            return (
                f"{bad} of {size} norms are 0, NaN or infinite: the run is broken, and "
                "no limit mends that. Look at the loss and the data of the first bad one."
            )
        if self.norm.size < FEWEST:
            return (
                f"{self.norm.size} usable norms are too few; record at least {FEWEST}, "
                "better a few hundred steps."
            )
        if self.norm.max() <= self.norm.min() * (1 + 1e-6):
            return f"every norm is {self.norm[0]:.4g}: such a log says nothing."
        if (share := pile_up(self.norm)) > 0.1:
            return (
                f"{share:.0%} of the norms sit at the largest, {self.norm.max():.4g}: "
                "these are norms after clipping. Log the norm before it, which "
                "clip_grad_norm_ returns."
            )
        return ""

    def decide(self) -> tuple[float | None, Rule | None, str, list[str]]:
        """Return limit, rule, confidence and the reasons."""
        if self.healthy.size:
            return self._before_the_loss()
        if why := self.refusal():
            return None, None, "none", [why]
        limit, reason = self._limit()
        reasons = [reason]
        rule: Rule = Norm(limit)
        if not 1 / 3 < self.drift < 3:
            rule = Percentile(q=90.0)
            reasons.append(
                f"the norms drift by a factor of {self.drift:.2g} from the first fifth "
                "to the last, so that no fixed limit fits the whole run: let it follow "
                "the norms."
            )
        reasons += self._on_the_run()
        return limit, rule, self._confidence(), reasons

    def _before_the_loss(self) -> tuple[float, Rule, str, list[str]]:
        """Return what little a run says that was lost: the norms before."""
        limit = rounded_up(float(np.median(self.healthy)))
        reason = (
            "the loss rose early and never came back, so that the later norms are those "
            f"of a broken model: {limit:g} is the median of the {self.healthy.size} "
            "norms before. Run again with it, and ask again."
        )
        return limit, Norm(limit), "low", [reason]

    def _limit(self) -> tuple[float, str]:
        """Return a limit just above the typical norm, and why this one."""
        if self._in_force_fits():
            return self.in_force, (
                f"{self.in_force:g} was in force and is just above the typical norm: "
                "there is nothing to change."
            )
        limit = rounded_up(self.quantiles[0.9][0])
        return limit, (
            f"{limit:g} is the 90th percentile of the norms"
            f"{' after the warm-up' if self.warmup else ''}: just above the typical "
            "norm, so that clipping stays the exception."
        )

    def _in_force_fits(self) -> bool:
        """Return whether the run's own limit was insurance, and not out of reach."""
        rate = float(np.mean(self.steady > self.in_force))
        return rate <= INSURANCE and self.in_force <= 3 * self.quantiles[0.5][0]

    def _on_the_run(self) -> list[str]:
        """Say how the run was clipped, where the log tells."""
        if not math.isfinite(self.in_force):
            return []
        rate = float(np.mean(self.norm > self.in_force))
        told = f"the run was clipped at {self.in_force:g} on {rate:.0%} of its steps"
        if rate > ALWAYS_ON:
            return [
                f"{told}: there the limit only sets the length of the step, and the "
                "learning rate is the lever. With a higher limit, lower the learning "
                "rate unless the optimizer ignores scale, as Adam does."
            ]
        return [f"{told}, which is {regime(rate)}."]

    def _confidence(self) -> str:
        _, low, high = self.quantiles[0.9]
        sure = high / low < 1.15 and 1 / 3 < self.drift < 3
        # Runs that repeat each other do not add up to a longer one.
        longest = int(np.bincount(self.record.run).max()) - self.warmup
        if longest >= 1000 and sure:
            return "high"
        return "medium" if longest >= 100 and high / low < 2 else "low"

    def experts(self) -> tuple[Expert, ...]:
        """Return the published rules of thumb, with what they would clip."""
        if not self.steady.size:
            return ()
        mean, ordered = float(np.mean(self.steady)), np.sort(self.steady)
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


def _in_force(limit: Floats) -> float:
    """Return the limit that was in force at most of the steps; NaN if unknown."""
    known = limit[~np.isnan(limit)]
    return float(np.median(known)) if known.size else math.nan


def find_spikes(record: Record) -> tuple[Spike, ...]:
    """Return the steps whose norm stands out from those around it.

    Args:
        record: A record; norms that are not finite are spikes, unless most are.

    Returns:
        The spikes in the order of the log.
    """
    norm, usable = record.norm, is_finite(record.norm)
    scores = np.zeros(norm.shape)
    if usable.sum() >= FEWEST:
        cut = _warmup(record, usable)
        parts = (norm[usable][:cut], norm[usable][cut:])
        scores[usable] = np.concatenate([spike_scores(part) for part in parts])
    if usable.sum() > norm.size / 2:
        scores[~np.isfinite(norm)] = math.inf
    return tuple(
        Spike(
            int(record.step[i]),
            float(norm[i]),
            float(scores[i]),
            _carriers(record, int(record.step[i])),
        )
        for i in np.flatnonzero(scores > SPIKE)
    )


def _carriers(record: Record, step: int) -> tuple[tuple[str, float], ...]:
    """Return the three largest parameters at a step, where they were recorded."""
    tensors = record.tensors
    if tensors is None:
        return ()
    at = np.flatnonzero(tensors.step == step)
    if not at.size:
        return ()
    row = np.where(np.isnan(tensors.norm[at[0]]), math.inf, tensors.norm[at[0]])
    largest = np.argsort(-row, kind="stable")[:3]
    return tuple((tensors.names[i], float(tensors.norm[at[0], i])) for i in largest)


def regime(rate: float) -> str:
    """Return what clipping is, by the share of steps that it acts on."""
    if rate <= INSURANCE:
        return "insurance"
    return "always on" if rate > ALWAYS_ON else "in between"


def rounded_up(value: float) -> float:
    """Return the next number with the two digits that a limit deserves.

    Example:
        >>> rounded_up(1.234), rounded_up(0.5), rounded_up(1961.0)
        (1.3, 0.5, 2000.0)
    """
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.2g}")


def call(rule: Rule | None) -> str:
    """Return the shortest call that makes a rule."""
    from dataclasses import fields, is_dataclass

    from gradclip.rules import stages

    if rule is None or not is_dataclass(rule):
        return repr(rule)
    if len(stages(rule)) > 1:
        return f"chain({', '.join(map(call, stages(rule)))})"
    given = {f.name: getattr(rule, f.name) for f in fields(rule)}
    told = [f for f in fields(rule) if given[f.name] != f.default]
    first = fields(rule)[0].name
    parts = [
        repr(given[f.name]) if f.name == first else f"{f.name}={given[f.name]!r}"
        for f in told
    ]
    return f"{type(rule).__name__}({', '.join(parts)})"


def _jsonable(value: Any) -> Any:
    """Return what JSON can hold in place of NaN, infinity and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _jsonable(x) for name, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_jsonable(x) for x in value]
    return value
