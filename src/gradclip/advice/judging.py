"""From the facts of a log to a decision: which limit, which rule, and how sure."""

import math
from typing import NamedTuple

import numpy as np

from gradclip.advice.evidence import pile_up
from gradclip.advice.facts import Facts
from gradclip.advice.spikes import FEWEST
from gradclip.record import Floats, no_norms
from gradclip.rules import Norm, Percentile, Rule, usable
from gradclip.wording import counted

FEWEST_BEFORE = 3
"""Norms before a loss that rose; of fewer, the median is but one of them."""
LAST = 5
"""Norms before a run was lost, among which what broke it would be."""
INSURANCE, ALWAYS_ON = 0.1, 0.5
DIGITS = 3
"""Of a share: as many as a percentage with one digit behind the point shows."""
# With more norms in memory, a limit that follows a rise lags behind, and clips most.
FOLLOWING = Percentile(q=90.0, window=100)


class Decision(NamedTuple):
    """What is recommended, how sure that is, and why; None where nothing is."""

    limit: float | None
    rule: Rule | None
    confidence: str
    reasons: list[str]


def decide(facts: Facts) -> Decision:
    """Return what the facts support."""
    before = facts.healthy
    few = _refusal(facts) if before is None else _too_few(before, facts.lost.how)
    if why := _no_norms(facts) or few:
        return Decision(None, None, "none", [why])
    if before is not None:
        return _before_it_was_lost(facts, before)
    limit, reason = _limit(facts)
    rule, reasons = _or_following(facts, limit, reason)
    return Decision(limit, rule, _confidence(facts), reasons + _on_the_run(facts))


def _refusal(facts: Facts) -> str:
    """Return why norms of a run that was not lost say nothing; empty if they do."""
    if facts.broken:
        return (
            f"{facts.unusable} of {facts.record.norm.size} norms are 0, NaN or "
            "infinite: the run is broken, and no limit mends that. Look at the loss "
            "where it began."
        )
    if facts.norm.size < FEWEST:
        return (
            f"{counted(facts.norm.size, 'usable norms are')} too few; record at "
            f"least {FEWEST}, better a few hundred steps."
        )
    if not facts.varies:
        return f"every norm is {facts.norm[0]:.4g}: such a log says nothing."
    return ""


def _no_norms(facts: Facts) -> str:
    """Return why the numbers are no norms of gradients before clipping."""
    if facts.measured.over == "element":
        return (
            f"{facts.record.rule} looks at each element, and what it recorded is "
            "the largest modulus. Record norms with Norm(float('inf'))."
        )
    if why := no_norms(facts.record.norm):
        return why
    varies = facts.norm.size >= FEWEST and facts.varies
    # Norms that are all alike sit at the largest, too, and are refused for that.
    if varies and (share := pile_up(facts.norm)) > 0.1:
        return (
            f"{share:.0%} of the norms sit at the largest, {facts.norm.max():.4g}: "
            "these are norms after clipping. Log the norm before it, which "
            "clip_grad_norm_ returns."
        )
    return ""


def _too_few(before: Floats, how: str) -> str:
    """Return why the norms before a run was lost say nothing; empty if they do."""
    if before.size >= FEWEST_BEFORE:
        return ""
    why = (
        f"of the {counted(before.size, 'norms')} before the median says nothing"
        if before.size
        else "no norm before that is usable"
    )
    return (
        f"{how}, and {why}; at least {FEWEST_BEFORE} are needed. "
        "Lower the learning rate until the loss falls, and ask again."
    )


def _before_it_was_lost(facts: Facts, before: Floats) -> Decision:
    """Return what little a run says that was lost: the norms before."""
    if _out_of_the_blue(facts, before):
        limit = rounded_up(float(np.quantile(before, 0.9)))
        reason = (
            f"{facts.lost.how}, and the norms did not grow before it: a limit may not "
            "prevent that. Go back to a checkpoint from before, with "
            "on_nonfinite='raise', which names the parameters, and look for a root or "
            f"a logarithm of 0 in the loss. {limit:g} is the 90th percentile of the "
            f"{counted(before.size, 'norms')} before."
        )
        return Decision(limit, Norm(limit, p=facts.measured.p), "low", [reason])
    limit = rounded_up(float(np.median(before)))
    reason = (
        f"{facts.lost.how}, so that the later norms are those of a broken model: "
        f"{limit:g} is the median of the {counted(before.size, 'norms')} before. "
        "Run again with it, and ask again."
    )
    return Decision(limit, Norm(limit, p=facts.measured.p), "low", [reason])


def _out_of_the_blue(facts: Facts, before: Floats) -> bool:
    """Return whether no norm is finite any more, and none had been larger than ever."""
    ends_bad = not np.isfinite(facts.record.norm[facts.lost.row :]).any()
    # Where a step that was too long broke the model, it stands out among the last.
    calm = before.size >= FEWEST and before[-LAST:].max() <= before[:-LAST].max()
    return bool(ends_bad and calm)


def _limit(facts: Facts) -> tuple[float, str]:
    """Return a limit just above the typical norm, and why this one."""
    if _in_force_fits(facts):
        return facts.in_force, (
            f"{facts.in_force:g} was in force and is just above the typical norm: "
            "there is nothing to change."
        )
    # Never past the next norms: of narrow ones, two digits would clip none.
    digits = (rounded_up(facts.quantiles[0.9][0], n) for n in range(2, 7))
    limit = next((x for x in digits if x <= facts.quantiles[0.95][0]), None)
    limit = limit or facts.quantiles[0.9][0]
    return limit, (
        f"{limit:g} is the 90th percentile of the norms"
        f"{' after the warm-up' if facts.warmup else ''}: just above the typical "
        "norm, so that clipping stays the exception."
    )


def _in_force_fits(facts: Facts) -> bool:
    """Return whether the run's own limit was insurance, and not out of reach."""
    rate = float(np.mean(facts.steady > facts.in_force))
    insures = regime(rate) == "insurance"
    return insures and facts.in_force <= 3 * facts.quantiles[0.5][0]


def _or_following(facts: Facts, limit: float, reason: str) -> tuple[Rule, list[str]]:
    """Return a rule with a limit, or one that follows norms that drift."""
    rule = Norm(limit, p=facts.measured.p)
    # Where the limit in force fits, there is nothing to change, whatever the drift.
    if limit == facts.in_force or not _drifts(facts):
        return rule, [reason]
    drifting = (
        f"the norms drift by a factor of {facts.drift:.2g} from the first fifth "
        "to the last, so that no fixed limit fits the whole run"
    )
    # What follows takes 2-norms.
    if facts.measured.p != 2:
        return rule, [reason, f"{drifting}."]
    return FOLLOWING, [f"{drifting}: let it follow the norms."]


def _drifts(facts: Facts) -> bool:
    return not 1 / 3 < facts.drift < 3


def _on_the_run(facts: Facts) -> list[str]:
    """Say how the run was clipped, where the log tells."""
    scale = facts.record.scale[np.isfinite(facts.record.scale)]
    # Norm(inf) only recorded: that nothing was clipped is no finding.
    if not scale.size or np.isposinf(facts.record.limit).all():
        return []
    # A rule that stretches acts as well.
    rate = float(np.mean(scale != 1))
    known = math.isfinite(facts.in_force)
    if not rate:
        which = f", {facts.in_force:g}," if known else ""
        return [f"the limit in force{which} never acted."]
    at = f" at {facts.in_force:g}" if known else ""
    often = f"the run was clipped{at} on {percent(rate)} of its steps"
    if rate > ALWAYS_ON:
        return [
            f"{often}: there the limit only sets the length of the step, and the "
            "learning rate is the lever. With a higher limit, lower the learning "
            "rate unless the optimizer ignores scale, as Adam does."
        ]
    return [f"{often}, which is {regime(rate)}."]


def _confidence(facts: Facts) -> str:
    """Return how sure a limit is: by the length of the log, and what it rests on."""
    if facts.still:
        return "low"
    _, low, high = facts.quantiles[0.9]
    sure = high / low < 1.15 and not _drifts(facts) and not facts.change
    # Runs that repeat each other do not add up to a longer one.
    known = usable(facts.record.norm)
    longest = int(np.bincount(facts.record.run[known]).max()) - facts.warmup
    if longest >= 1000 and sure:
        return "high"
    return "medium" if longest >= 100 and high / low < 2 else "low"


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
