"""What another rule would have done on recorded norms: the rules' own text again."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import array_api_compat.numpy as xp_numpy
import numpy as np

from gradclip.arrays import check_rule
from gradclip.history import History
from gradclip.pipeline import Info, decide, summary
from gradclip.record import Floats, Record, Steps
from gradclip.rules import Measured, Rule, State, stages

PLAINLY = (
    "A replay takes the norms as they were. A run clipped in another way would have "
    "had other norms from its first clipped step on."
)


@dataclass(frozen=True)
class Replay:
    """What a rule would have done, one number for each recorded step."""

    rule: Rule
    step: Steps
    norm: Floats
    limit: Floats
    scale: Floats

    @property
    def clip_rate(self) -> float:
        """The share of steps with a scale below 1."""
        return float(np.mean(self.scale < 1)) if self.scale.size else 0.0

    @property
    def norm_after(self) -> Floats:
        """The norm that would have passed at each step."""
        with np.errstate(invalid="ignore"):
            return np.where(self.scale != 1, self.norm * self.scale, self.norm)


def replay(
    history: History, rule: Rule, progress: Callable[[int], object] | None = None
) -> Replay:
    """Tell what a rule would have done on the norms of a run.

    The rule sees the norms as they were recorded. A run clipped in another way would
    have had other norms from its first clipped step on.

    Args:
        history: Norms before clipping.
        rule: A rule over `"all"` gradients, or over each `"tensor"` if the norms of the
            parameters were recorded at every step.
        progress: Called with the number of steps done since the last call.

    Returns:
        Limits and factors, and the clip rate.

    Raises:
        ValueError: If the rule needs more than the history holds.

    Example:
        >>> import gradclip as gc
        >>> history = gc.History.of([1.0, 2.0, 8.0, 1.0])
        >>> again = gc.replay(history, gc.Norm(4.0))
        >>> again.scale.tolist(), again.clip_rate
        ([1.0, 1.0, 0.5, 1.0], 0.25)
    """
    check_rule(rule)
    record = history.recorded
    _check(rule)
    norms = _norms(record, rule)
    limit, scale = np.empty(record.norm.size), np.empty(record.norm.size)
    with np.errstate(all="ignore"):
        if not rule.stateful:
            _all_at_once(norms, rule, limit, scale)
        else:
            for i, info in enumerate(_one_by_one(norms, rule)):
                limit[i], scale[i] = _most(info.limit), np.min(info.scale)
                if progress and i % 1000 == 999:
                    progress(1000)
    return Replay(rule, record.step, record.norm, limit, scale)


def _check(rule: Rule) -> None:
    """Refuse what norms alone cannot tell."""
    for stage in stages(rule):
        if stage.needs_weight:
            raise ValueError(
                f"replay: {stage!r} compares gradients with parameters, and a history "
                "holds no parameters; it can only be tried in training."
            )
        if stage.over in ("unit", "element"):
            raise ValueError(
                f"replay: {stage!r} looks at each {stage.over}, and a history holds the "
                "norm of all gradients; use over='all'."
            )


def _norms(record: Record, rule: Rule) -> Floats:
    """Return the norms that a rule looks at: of all gradients, or of each tensor."""
    scopes = {stage.over for stage in stages(rule)}
    if scopes == {"all"}:
        return record.norm
    tensors = record.tensors
    if (
        tensors is None
        or scopes != {"tensor"}
        or not np.array_equal(tensors.step, record.step)
    ):
        raise ValueError(
            f"replay: {rule!r} needs the norm of each parameter at every step; record "
            "them with History(path, tensors_every=1)."
        )
    return tensors.norm


def _all_at_once(norms: Floats, rule: Rule, limit: Floats, scale: Floats) -> None:
    """Take all steps through a rule without memory in one go."""
    infos = []
    seen = norms
    for stage in stages(rule):
        info, _ = decide(stage, Measured(seen, None, 0, xp_numpy), {})
        infos.append(info)
        seen = info.norm_after
    whole = math.prod(1.0 * np.asarray(info.scale) for info in infos)
    last = np.asarray(infos[-1].limit)
    limit[:] = last if last.ndim == 1 else np.max(last, axis=1)
    scale[:] = whole if np.ndim(whole) == 1 else np.min(whole, axis=1)


def _one_by_one(norms: Floats, rule: Rule) -> Iterator[Info]:
    """Yield what a rule with a memory does at each step."""
    xp: Any = Scalars() if norms.ndim == 1 else xp_numpy
    first = norms[0] if norms.size else np.float64(0)
    states: list[State] = [stage.init(first * 0 + 1, xp) for stage in stages(rule)]
    for step, norm in enumerate(norms):
        infos, seen = [], norm
        for i, stage in enumerate(stages(rule)):
            absent = None if norms.ndim == 1 else np.isnan(norm)
            measured = Measured(seen, None, step, xp)
            info, states[i] = decide(stage, measured, states[i], absent)
            infos.append(info)
            seen = info.norm_after
        yield summary(infos, xp)


def _most(limit: Any) -> float:
    return float(limit) if np.ndim(limit) == 0 else float(np.nanmax(limit))


class Scalars:
    """The array namespace for one number at a time, which NumPy is slow with.

    Only the functions that rules spend their time in differ; the others are NumPy's.
    """

    def __getattr__(self, name: str) -> Any:
        """Return NumPy's function, and keep it at hand."""
        found = getattr(xp_numpy, name)
        setattr(self, name, found)
        return found

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        """Choose between two numbers, or places of arrays."""
        if not isinstance(condition, (bool, np.bool_)) or np.ndim(a) or np.ndim(b):
            return np.where(condition, a, b)
        chosen = a if condition else b
        return chosen if isinstance(chosen, np.generic) else np.float64(chosen)

    @staticmethod
    def isfinite(x: Any) -> Any:
        """Return whether a number is finite."""
        return math.isfinite(x) if isinstance(x, float) else np.isfinite(x)

    @staticmethod
    def clip(x: Any, low: Any, high: Any) -> Any:
        """Return a number held between two others, NaN as it is."""
        if not isinstance(x, float):
            return np.clip(x, low, high)
        if low is not None and x < low:
            return np.float64(low)
        return np.float64(high) if high is not None and x > high else x

    @staticmethod
    def all(x: Any) -> Any:
        """Return whether all of them hold."""
        return np.bool_(x) if isinstance(x, (bool, np.bool_)) else np.all(x)

    @staticmethod
    def any(x: Any) -> Any:
        """Return whether any of them holds."""
        return np.bool_(x) if isinstance(x, (bool, np.bool_)) else np.any(x)

    @staticmethod
    def ones_like(x: Any) -> Any:
        """Return 1 or true, or an array of them."""
        return x.dtype.type(1) if isinstance(x, np.generic) else np.ones_like(x)

    @staticmethod
    def zeros_like(x: Any) -> Any:
        """Return 0, or an array of zeros."""
        return np.float64(0) if isinstance(x, float) else np.zeros_like(x)
