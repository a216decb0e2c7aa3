"""Parameters that come later: what is remembered of the others takes its new place."""

import math
from collections.abc import Sequence
from typing import TypeAlias

from gradclip.rules import Rule, State, stages
from gradclip.rules.keys import by_place, placed

Places: TypeAlias = list[tuple[int, int]]
"""Of parameters that are still there: their place now, and the one before."""


def take_over(
    rule: Rule,
    states: Sequence[State | None],
    old: Sequence[State | None],
    kept: Places,
    counts: tuple[int, int],
) -> None:
    """Fill new memories of a rule with what the old ones have.

    `counts` is how many parameters there are now, and how many there were.
    """
    now, then = counts
    for stage, state, before in zip(stages(rule), states, old, strict=True):
        if state is not None and before:
            _fill(stage, state, before, _with_companions(stage, kept, now), then)


def _with_companions(stage: Rule, kept: Places, count: int) -> Places:
    """Return places now and before, with those of new ones that share a memory."""
    before = dict(kept)
    new = [i for i in range(count) if i not in before]
    known = list(before)
    pairs = [(i, stage.companion(i, known)) for i in new]
    return kept + [(i, before[k]) for i, k in pairs if k is not None]


def _fill(stage: Rule, state: State, before: State, kept: Places, count: int) -> None:
    """Fill a new memory with what an old one has of parameters that are still there.

    `kept` has their places, now and before, when there were `count` of them.
    """
    if stage.by_part:
        parts = by_place(before)
        for i, j in kept:
            state.update(placed(parts.get(str(j), {}), i))
        return
    now, then = [i for i, _ in kept], [j for _, j in kept]
    for name, x in before.items():
        if not (stage.over == "tensor" or stage.by_place):
            state[name] = x
        elif x.shape[-1:] == (count,):
            if state[name].shape[:-1] != x.shape[:-1]:
                # A window that has grown; infinity marks what is still free.
                size = (*x.shape[:-1], state[name].shape[-1])
                state[name] = x.new_full(size, math.inf)
            state[name][..., now] = x[..., then]
        else:
            # Of units, the first ones are those that were there.
            state[name][..., : x.shape[-1]] = x
