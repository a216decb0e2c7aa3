"""Advice as text: the recommendation first, then what it rests on."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradclip.wording import counted, sentence

if TYPE_CHECKING:
    from gradclip.advice.advising import Advice

SHOWN = 10


def tell(advice: "Advice") -> str:
    """Return advice as plain text.

    Args:
        advice: What `advise` returned.

    Returns:
        Lines of at most about 90 characters.
    """
    return "\n".join(_lines(advice))


def _lines(advice: "Advice") -> Iterator[str]:
    if advice.limit is None:
        yield "No recommendation."
    else:
        yield f"Recommended: {advice.code}    confidence: {advice.confidence}"
    # What share of a broken model's steps is clipped says nothing.
    if advice.followed:
        count = counted(advice.followed.norm.size, "norms")
        share = f"{advice.followed.clipped:.1%}"
        yield f"Replayed over the last {count}, it clips {share}: {advice.regime}."
    elif advice.limit is not None and not advice.lost:
        rate = advice.clip_rate(advice.limit)
        later = advice.clip_rate(advice.limit, after_warmup=True)
        apart = f", {later:.1%} of those after the warm-up" if advice.warmup else ""
        share = f"{rate:.1%} of the finite norms{apart}"
        yield f"Limit {advice.limit:g} clips {share}: {advice.regime}."
    yield from (f"  - {sentence(reason)}" for reason in advice.reasons)
    steps = counted(advice.steps, "steps")
    yield f"Norms: {steps}, of them {advice.nonfinite} not finite."
    yield from _numbers(advice)
    yield from _spikes(advice)
    if advice.notes:
        yield "Noticed:"
        yield from (f"  - {sentence(note)}" for note in advice.notes)


def _numbers(advice: "Advice") -> Iterator[str]:
    if not advice.quantiles:
        return
    yield "  percentile   norm       95 % interval"
    for share, (value, low, high) in advice.quantiles.items():
        yield f"  {share:>10.0%}   {value:<10.4g} {low:.4g} to {high:.4g}"
    drift = f"drift: last fifth / first fifth = {advice.drift:.2f}"
    yield f"  {drift}; {_tail(advice.tail, advice.tail_spread)}"
    # Zeros and the warm-up are not among them, as they are in the line at the top.
    apart = (
        " (of the norms in the table above)" if advice.warmup or advice.zeros else ""
    )
    yield f"Rules of thumb        limit      clips{apart}"
    for expert in advice.experts:
        row = f"  {expert.name:<20}{expert.limit:<10.4g} {expert.clip_rate:<7.1%}"
        yield f"{row} {expert.source}"


def _tail(index: float, spread: float) -> str:
    if math.isnan(index):
        return "too few norms for the tail"
    if math.isinf(index):
        return "no tail: the largest norms are alike"
    low, high = index - spread, index + spread
    kind = "not heavy" if low > 2 else "heavy or not"
    if high <= 2:
        kind = "heavy, as of numbers without a variance"
    return f"tail index {index:.1f} ({low:.1f} to {high:.1f}), {kind}"


def _spikes(advice: "Advice") -> Iterator[str]:
    spikes = sorted(advice.spikes, key=lambda spike: -spike.size)
    if not spikes:
        yield "No spikes."
        return
    share = len(spikes) / advice.steps
    shown = min(len(spikes), SHOWN)
    many = f"; the largest {shown}" if shown > 1 else ""
    yield f"{counted(len(spikes), 'spikes')} ({share:.2%} of the steps){many}:"
    for spike in spikes[:SHOWN]:
        carried = ", ".join(f"{name} {norm:.3g}" for name, norm in spike.tensors)
        tail = f"  carried by {carried}" if carried else ""
        size = f"norm {spike.norm:<9.4g} z {spike.score:.1f}"
        yield f"  step {spike.step:<9} {size}{tail}"
