"""Where the threshold belongs, told from the norms of a run, and how sure that is."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gradclip.advice.comparing import comparable
from gradclip.advice.evidence import share_above, tail_index, tail_spread
from gradclip.advice.experts import Expert, experts
from gradclip.advice.facts import facts_of
from gradclip.advice.judging import decide, regime
from gradclip.advice.noticing import noticed
from gradclip.advice.replaying import Replay, replay_end
from gradclip.advice.spikes import Spike
from gradclip.advice.text import tell
from gradclip.history import History, recorded
from gradclip.record import Floats, is_norm
from gradclip.rules import Rule
from gradclip.ruletext import call


@dataclass(frozen=True)
class Advice:
    """What `advise` found out; `print` it for the whole text."""

    limit: float | None
    """The recommended limit; None where the log does not support one.

    Beside a rule that follows the norms, what a fixed one would be.
    """
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
    """Hill's tail index; numbers with one of 2 or below have no variance."""
    tail_spread: float
    """By how much the index may be off: twice its standard error."""
    experts: tuple[Expert, ...]
    in_force: float
    """The limit that the run was clipped with; NaN where the log does not tell."""
    lost: bool
    """Whether the loss rose for good, or no norm was finite from some step on."""
    followed: Replay | None
    """The recommended rule on the last steps, where it follows the norms."""
    _ordered: Floats = field(repr=False)
    _steady: Floats = field(repr=False)

    @property
    def code(self) -> str:
        """The line to paste; empty where there is no recommendation."""
        return f"attach(optimizer, {call(self.rule)})" if self.rule else ""

    @property
    def regime(self) -> str:
        """What clipping at the recommended limit is: by how often it acts."""
        if self.limit is None or self.lost:
            return "unknown"
        if self.followed:
            return regime(self.followed.clipped)
        return regime(self.clip_rate(self.limit, after_warmup=True))

    @property
    def rate(self) -> float | None:
        """The share of the finite norms that the recommended rule clips."""
        if self.followed:
            return self.followed.clipped
        return self.clip_rate(self.limit) if self.limit else None

    def clip_rate(self, limit: float, after_warmup: bool = False) -> float:
        """Return the share of the finite norms that are above a limit.

        Args:
            limit: In the unit of the norms.
            after_warmup: Leave out the steps that were set apart.

        Returns:
            A number between 0 and 1; norms that are NaN or infinite do not count.
        """
        ordered = self._steady if after_warmup else self._ordered
        return float(share_above(ordered, limit))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it: NaN and infinity are null."""
        facts = {name: getattr(self, name) for name in _FACTS}
        facts["rule"] = call(self.rule) if self.rule else None
        facts["clip_rate"] = self.rate
        facts["quantiles"] = {str(q): list(x) for q, x in self.quantiles.items()}
        facts["spikes"] = [asdict(spike) for spike in self.spikes]
        facts["experts"] = [asdict(expert) for expert in self.experts]
        return {name: _jsonable(x) for name, x in facts.items()}

    def __str__(self) -> str:
        """Tell it all, the recommendation first."""
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
    "tail_spread",
    "in_force",
    "lost",
)


# A caller may have NumPy raise where something falls below the smallest number.
@np.errstate(under="ignore")
def advise(history: History) -> Advice:
    r"""Tell from a run's norms where to put the threshold, and how sure that is.

    $c = \operatorname{quantile}_{0.9}(\lVert g_t \rVert)$ over the steps after the
    warm-up, unless the log shows that this is wrong.

    Args:
        history: Norms before clipping, of one run or of several alike.

    Returns:
        The advice. Its limit is None where the log does not support one, and the
        reasons say why.

    Raises:
        TypeError: For what is no history.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> norms = np.random.default_rng(0).lognormal(sigma=0.3, size=2000)
        >>> norms[700] = 50.0
        >>> advice = gc.advise(gc.History.of(norms))
        >>> advice.code, [spike.step for spike in advice.spikes]
        ('attach(optimizer, Norm(1.5))', [700])
        >>> round(advice.clip_rate(advice.limit), 2), advice.confidence
        (0.09, 'high')

    Reference:
        Godbole, Dahl, Gilmer, Shallue, Nado: Deep learning tuning playbook. 2023.
    """
    record, notes = comparable(recorded("advise", history))
    facts = facts_of(record)
    limit, rule, confidence, reasons = decide(facts)
    return Advice(
        limit=limit,
        rule=rule,
        confidence=confidence,
        reasons=tuple(reasons),
        notes=(*notes, *noticed(facts)),
        steps=int(record.norm.size),
        nonfinite=int((~np.isfinite(record.norm)).sum()),
        zeros=int((record.norm == 0).sum()),
        warmup=facts.warmup,
        quantiles=facts.quantiles,
        spikes=facts.spikes,
        drift=facts.drift,
        tail=tail_index(facts.steady),
        tail_spread=tail_spread(facts.steady),
        experts=experts(facts.steady),
        in_force=facts.in_force,
        lost=facts.healthy is not None,
        followed=replay_end(record, rule) if rule and rule.stateful else None,
        _ordered=np.sort(record.norm[is_norm(record.norm)]),
        _steady=np.sort(facts.steady),
    )


def _jsonable(value: Any) -> Any:
    """Return what JSON can hold in place of NaN, infinity and tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _jsonable(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(x) for x in value]
    return value
