"""Which tensor each part of a memory belongs to: by its name, else by its place."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradclip.rules import Rule, State, stages
from gradclip.rules.keys import by_place, placed


def has_places(stage: Rule) -> bool:
    """Return whether a memory depends on which tensor is the first, the second, …."""
    return stage.stateful and (
        stage.over == "tensor" or stage.by_place or stage.by_part
    )


def places(stage: Rule, state: State | None) -> int:
    """Return of how many tensors a memory keeps something apart."""
    if not has_places(stage):
        return 0
    if stage.by_part:
        return len(by_place(state or {}))
    return max((x.shape[-1] for x in (state or {}).values() if x.ndim), default=0)


def in_order(
    rule: Rule,
    states: Sequence[State | None],
    before: Sequence[str],
    now: Sequence[str],
) -> Sequence[State | None]:
    """Return memories in another order of the same tensors; else as they are."""
    # Two tensors under one name cannot be told apart by it.
    if list(before) == list(now) or len(set(now)) < len(now):
        return states
    if sorted(before) != sorted(now):
        return states
    place = {name: i for i, name in enumerate(before)}
    order = np.array([place[name] for name in now])
    both = zip(stages(rule), states, strict=True)
    return [s and _reordered(stage, s, order) for stage, s in both]


def _reordered(
    stage: Rule, state: State, order: "np.ndarray[Any, np.dtype[np.int64]]"
) -> State:
    """Return a memory whose place k is the place order[k] that it had."""
    if not has_places(stage):
        return state
    if not stage.by_part:
        fits = {name: x.shape[-1:] == order.shape for name, x in state.items()}
        return {name: x[..., order] if fits[name] else x for name, x in state.items()}
    now = {str(old): str(new) for new, old in enumerate(order)}
    found: State = {}
    for place, part in by_place(state).items():
        found |= placed(part, now.get(place, place))
    return found
