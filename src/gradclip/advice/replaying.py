"""What another rule would have done on recorded norms: the rules' own text again."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import array_api_compat.numpy as xp_numpy
import numpy as np

from gradclip.arguments import check_rule
from gradclip.decision import Info, decide
from gradclip.history import History, recorded
from gradclip.host import norm_of_cells, smallest
from gradclip.pipeline import summary
from gradclip.record import Floats, Record, Steps, is_norm, kind_of, no_norms
from gradclip.rules import Measured, Norm, Normalize, Rule, State, stages, usable
from gradclip.scalars import Scalars

PER_STEP = (Norm, Normalize)
"""Rules that look at each norm by itself, so that all steps can be done at once."""
PLAINLY = (
    "A replay takes the norms as they were. A run clipped in another way would have "
    "had other norms from its first clipped step on."
)


LONGEST = 10_000
"""Rules that remember take a while for more steps than this."""


@dataclass(frozen=True)
class Replay:
    """What a rule would have done, one number for each recorded step."""

    rule: Rule
    step: Steps
    norm: Floats
    limit: Floats
    scale: Floats
    norm_after: Floats
    """The norm that would have passed."""

    @property
    def clip_rate(self) -> float:
        """The share of steps with a scale below 1."""
        return float(np.mean(self.scale < 1)) if self.scale.size else 0.0

    @property
    def clipped(self) -> float:
        """The share of the finite norms with a scale below 1, as in advice."""
        scale = self.scale[is_norm(self.norm)]
        return float(np.mean(scale < 1)) if scale.size else math.nan


def replay(
    history: History, rule: Rule, progress: Callable[[int], object] | None = None
) -> Replay:
    r"""Tell what a rule would have done on the norms of a run.

    $c_t, s_{t+1} = \text{rule}(\lVert g_t \rVert, s_t)$

    The rule sees the norms as they were recorded. A run clipped in another way would
    have had other norms from its first clipped step on.

    Args:
        history: Norms before clipping.
        rule: A rule over `"all"` gradients, or over each `"tensor"` if the norms of
            the parameters were recorded at every step.
        progress: Called with the number of steps done since the last call.

    Returns:
        Limits and factors, and the clip rate.

    Raises:
        TypeError: For what is no history, or no rule.
        ValueError: If the rule needs more than the history holds, and for numbers
            below 0.

    Example:
        >>> import gradclip as gc
        >>> history = gc.History.of([1.0, 2.0, 8.0, 1.0])
        >>> again = gc.replay(history, gc.Norm(4.0))
        >>> again.scale.tolist(), again.clip_rate
        ([1.0, 1.0, 0.5, 1.0], 0.25)
    """
    check_rule(rule)
    record = recorded("replay", history)
    _check(rule)
    if why := no_norms(record.norm):
        raise ValueError(f"replay: {why}")
    norms, bound = _norms(record, rule), rule
    _check_order(record, norms, rule)
    if record.tensors is not None and norms.ndim == 2:
        # Norms have no shapes; rules that ask for them were refused above.
        bound = rule.bind(record.tensors.names, [()] * norms.shape[1])
    found, reported = np.empty((3, record.norm.size)), 0
    with np.errstate(all="ignore"):
        if not rule.stateful and all(isinstance(s, PER_STEP) for s in stages(rule)):
            _all_at_once(norms, rule, found)
        else:
            for i, info in enumerate(_one_by_one(norms, bound, record)):
                found[:, i] = _told(info)
                if progress and i % 1000 == 999:
                    progress(1000)
                    reported = i + 1
    if progress and reported < record.norm.size:
        progress(record.norm.size - reported)
    return Replay(rule, record.step, record.norm, *found)


def replay_end(record: Record, rule: Rule) -> Replay:
    """Replay a rule; one that remembers, on the last usable norms of a long log."""
    if rule.stateful and record.norm.size > LONGEST:
        record = record.take(np.flatnonzero(usable(record.norm))[-LONGEST:])
    return replay(History.from_record(record, None), rule)


def _check_order(record: Record, norms: Floats, rule: Rule) -> None:
    """Refuse norms of another order; those of parameters are 2-norms."""
    if record.format == "arrays" and not record.rule:
        # Whoever hands over numbers knows what they are.
        return
    runs = np.unique(record.run).tolist() if norms.ndim == 1 else []
    orders = {kind_of(record.rule_of(name))[0] for name in runs} or {2.0}
    for stage, p in product(stages(rule), sorted(orders)):
        if stage.p != p:
            raise ValueError(
                f"replay: {stage!r} looks at norms of order {stage.p:g}, and the "
                f"history holds those of order {p:g}."
            )


def _check(rule: Rule) -> None:
    """Refuse what norms alone cannot tell."""
    for stage in stages(rule):
        if stage.needs_weight:
            raise ValueError(
                f"replay: {stage!r} compares gradients with parameters, and a history "
                "holds no parameters; it can only be tried in training."
            )
        if stage.needs_shape:
            raise ValueError(
                f"replay: {stage!r} counts elements, and a history holds no shapes; "
                "it can only be tried in training."
            )
        if stage.over in ("unit", "element", "singular"):
            raise ValueError(
                f"replay: {stage!r} looks at each {stage.over}, and a history holds "
                "the norm of all gradients: it can only be tried in training, or a "
                "rule over 'all' here."
            )


def _norms(record: Record, rule: Rule) -> Floats:
    """Return the norms that a rule looks at: of all gradients, or of each tensor."""
    scopes = {stage.over for stage in stages(rule)}
    if scopes == {"all"}:
        return record.norm
    tensors = record.tensors
    if scopes != {"tensor"}:
        raise ValueError(
            f"replay: {rule!r} looks at all gradients and at each tensor, in turn; a "
            "replay does one or the other, or it can be tried in training."
        )
    if tensors is None or not np.array_equal(tensors.step, record.step):
        raise ValueError(
            f"replay: {rule!r} needs the norm of each parameter at every step; record "
            "them with History(path, tensors_every=1) and a clipper of gradclip.torch."
        )
    return tensors.norm


def _all_at_once(norms: Floats, rule: Rule, found: Floats) -> None:
    """Take all steps through a rule without memory in one go."""
    infos = []
    seen = norms
    for stage in stages(rule):
        info, _ = decide(stage, Measured(seen, None, 0, xp_numpy), {})
        infos.append(info)
        # What one stage lets through is what the next one measures.
        seen = info.norm_after
    scale = math.prod(np.asarray(info.scale) for info in infos)
    joined: list[tuple[Floats, Callable[[Floats], float]]] = [
        (np.asarray(infos[-1].limit), norm_of_cells),
        (np.asarray(scale), smallest),
        (seen, norm_of_cells),
    ]
    for i, (cells, join) in enumerate(joined):
        found[i] = cells if cells.ndim == 1 else [join(row) for row in cells]


def _one_by_one(norms: Floats, rule: Rule, record: Record) -> Iterator[Info]:
    """Yield what a rule does at each step that depends on other norms of its run."""
    # Array libraries are slow at one number at a time, and a log may have a million.
    xp: Any = Scalars() if norms.ndim == 1 else xp_numpy
    first = np.ones_like(norms[0]) if len(norms) else np.float64(1)
    states: list[State] = []
    runs = record.run
    for i, norm in enumerate(norms):
        # Each run in a file began with an empty memory of its own.
        if i == 0 or runs[i] != runs[i - 1]:
            states = [stage.init(first, xp) for stage in stages(rule)]
        info, after = _one_step(norm, rule, int(record.step[i]), states, xp)
        # As in training: a step that is dropped leaves no trace.
        if bool(info.kept & info.finite):
            states = after
        yield info


def _one_step(
    norm: Any, rule: Rule, step: int, states: list[State], xp: Any
) -> tuple[Info, list[State]]:
    # A tensor without a gradient was recorded as NaN.
    absent = None if np.ndim(norm) == 0 else np.isnan(norm)
    infos, after = [], []
    for stage, state in zip(stages(rule), states, strict=True):
        seen = Measured(norm, None, step, xp, absent=absent)
        info, new = decide(stage, seen, state)
        infos.append(info)
        after.append(new)
        norm = info.norm_after
    return summary(infos, xp), after


def _told(info: Info) -> tuple[float, float, float]:
    """Return the limit, the scale and the norm that passed, as a history has them."""
    after = info.norm_after if info.kept else 0.0
    limit, scale = np.asarray(info.limit), np.asarray(info.scale)
    return norm_of_cells(limit), smallest(scale), norm_of_cells(np.asarray(after))
