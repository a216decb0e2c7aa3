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
from gradclip.rules import Measured, Norm, Normalize, Rule, State, stages

_XP: Any = xp_numpy
_TRUE, _FALSE = np.bool_(True), np.bool_(False)
PER_STEP = (Norm, Normalize)
"""Rules that look at each norm by itself, so that all steps can be done at once."""
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
    norms, bound = _norms(record, rule), rule
    if record.tensors is not None and norms.ndim == 2:
        bound = rule.bind(record.tensors.names, [()] * norms.shape[1])
    limit, scale = np.empty(record.norm.size), np.empty(record.norm.size)
    with np.errstate(all="ignore"):
        if not rule.stateful and all(isinstance(s, PER_STEP) for s in stages(rule)):
            _all_at_once(norms, rule, limit, scale)
        else:
            for i, info in enumerate(_one_by_one(norms, bound)):
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
        if stage.needs_shape:
            raise ValueError(
                f"replay: {stage!r} counts elements, and a history holds no shapes; "
                "it can only be tried in training."
            )
        if stage.over in ("unit", "element", "singular"):
            raise ValueError(
                f"replay: {stage!r} looks at each {stage.over}, and a history holds "
                "the norm of all gradients; use over='all'."
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
    """Yield what a rule does at each step that depends on other norms."""
    xp: Any = Scalars() if norms.ndim == 1 else xp_numpy
    first = np.ones_like(norms[0]) if len(norms) else np.float64(1)
    states: list[State] = [stage.init(first, xp) for stage in stages(rule)]
    for step, norm in enumerate(norms):
        info, after = _one_step(norm, rule, step, states, xp)
        # As in training: a step that is dropped leaves no trace.
        if bool(info.kept & info.finite):
            states = after
        yield info


def _one_step(
    norm: Any, rule: Rule, step: int, states: list[State], xp: Any
) -> tuple[Info, list[State]]:
    absent = None if np.ndim(norm) == 0 else np.isnan(norm)
    infos, after = [], []
    for stage, state in zip(stages(rule), states, strict=True):
        seen = Measured(norm, None, step, xp)
        info, new = decide(stage, seen, state, absent)
        infos.append(info)
        after.append(new)
        norm = info.norm_after
    return summary(infos, xp), after


def _most(limit: Any) -> float:
    return float(limit) if np.ndim(limit) == 0 else float(np.nanmax(limit))


class Scalars:
    """The array namespace for one number at a time, which NumPy is slow with.

    The functions that rules spend their time in are quick for numbers here, and NumPy's
    own for arrays; all others are those of `array_api_compat`.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self._ones = self._counted = np.empty(0)

    def __getattr__(self, name: str) -> Any:
        """Return the function, and keep it at hand."""
        found = getattr(np, name, None) or getattr(xp_numpy, name)
        setattr(self, name, found)
        return found

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        """Choose between two numbers, or places of arrays."""
        chosen = a if condition is _TRUE else b
        if condition is not _TRUE and condition is not _FALSE:
            return np.where(condition, a, b)
        if type(chosen) is np.float64:
            return chosen
        if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
            return np.where(condition, a, b)
        return chosen if isinstance(chosen, np.generic) else np.float64(chosen)

    @staticmethod
    def isfinite(x: Any) -> Any:
        """Return whether a number is finite."""
        return np.bool_(math.isfinite(x)) if isinstance(x, float) else np.isfinite(x)

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

    def ones_like(self, x: Any) -> Any:
        """Return 1 or true, or an array of them: the same one each time."""
        if isinstance(x, np.generic):
            return x.dtype.type(1)
        if self._ones.shape != x.shape or self._ones.dtype != x.dtype:
            self._ones = np.ones_like(x)
            self._counted = np.empty(0)
        return self._ones

    def cumulative_sum(self, x: Any, *, axis: int | None = None) -> Any:
        """Return sums so far; rules count places with it, which is kept."""
        if x is not self._ones:
            return _XP.cumulative_sum(x, axis=axis)
        if self._counted.shape != x.shape:
            self._counted = _XP.cumulative_sum(x, axis=axis)
        return self._counted

    @staticmethod
    def zeros_like(x: Any) -> Any:
        """Return 0, or an array of zeros."""
        return np.float64(0) if isinstance(x, float) else np.zeros_like(x)
