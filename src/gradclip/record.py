"""What is known about a run: one number of each kind for every recorded step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradclip.decision import clip_scale
from gradclip.rules import stages
from gradclip.ruletext import recorded_rule

Floats: TypeAlias = NDArray[np.float64]
Steps: TypeAlias = NDArray[np.int64]
NOT_TAKEN = -1
"""What loggers write for a norm that was not taken, as at a step that was skipped."""


def no_norms(norm: Floats) -> str:
    """Return why numbers are no norms; empty if none but a missing one is below 0."""
    low = norm[(norm < 0) & (norm != NOT_TAKEN)]
    if not low.size:
        return ""
    return (
        f"{low.size} of {norm.size} numbers are below 0, such as {low[0]:.4g}, and no "
        "norm is. Is it a logarithm? Another column is named with column=… (--column)."
    )


class LogError(ValueError):
    """A file cannot be read as a log; the message names the file and the line."""


@dataclass(frozen=True)
class Tensors:
    """The norm of each parameter at some of the steps; NaN where it had no gradient."""

    names: tuple[str, ...]
    step: Steps
    norm: Floats
    """One row for each of these steps, one column for each name."""
    run: NDArray[np.int64]
    """To which run each of these steps belongs."""

    def of_run(self, name: int) -> "Tensors":
        """Return the norms of one run."""
        own = self.run == name
        return Tensors(self.names, self.step[own], self.norm[own], self.run[own])


@dataclass(frozen=True)
class Record:
    """The steps of a run, or of several runs one after the other."""

    step: Steps
    norm: Floats
    limit: Floats
    """NaN where the log does not tell."""
    scale: Floats
    """NaN where the log does not tell."""
    loss: Floats
    """NaN where the log does not tell."""
    run: NDArray[np.int64]
    """To which run each step belongs, counted from 0."""
    rule: str = ""
    """The newest rule, where it changed."""
    rules: tuple[str, ...] = ()
    """The newest rule of each run, where they differ."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Tensors | None = None
    format: str = "arrays"
    column: str = "norm"
    networks: tuple[str, ...] = ()
    """Columns with the norms of other networks in the same log."""
    notes: tuple[str, ...] = ()
    """What was odd about the log, in sentences."""

    @property
    def several(self) -> bool:
        """Whether there are steps of more than one run."""
        return np.unique(self.run).size > 1

    def take(self, rows: Any) -> "Record":
        """Return the record with some of its rows."""
        names = ("step", "norm", "limit", "scale", "loss", "run")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def of_run(self, name: int) -> "Record":
        """Return the steps of one run."""
        tensors = self.tensors and self.tensors.of_run(name)
        own, rule = self.take(self.run == name), self.rule_of(name)
        return replace(own, tensors=tensors, rule=rule)

    def rule_of(self, name: int) -> str:
        """Return the rule of one run."""
        return self.rules[name] if self.rules else self.rule

    def also(self, *notes: str) -> "Record":
        """Return the record with more said about it; nothing is said twice."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))


def is_norm(norm: Floats) -> NDArray[np.bool_]:
    """Return where a step has a norm that a clip rate counts: finite, not below 0.

    Zeros are those of steps without a signal, which no limit clips.
    """
    return np.isfinite(norm) & (norm >= 0)


def kind_of(rule: str) -> tuple[float, bool]:
    """Return what the norms are that were recorded under a rule.

    Returns:
        Their order, and whether they are those of single elements.
    """
    first = stages(recorded_rule(rule))[0]
    return first.p, first.over == "element"


def record_of(
    norm: Sequence[float] | Floats,
    step: Sequence[int] | Steps | None = None,
    limit: Sequence[float] | Floats | float = np.nan,
    scale: Sequence[float] | Floats | float | None = None,
    loss: Sequence[float] | Floats | float = np.nan,
) -> Record:
    """Return a record of one run, with everything in arrays of one length."""
    norms = np.asarray(norm, dtype=np.float64).reshape(-1)

    def beside(name: str, values: Any) -> Floats:
        given = np.asarray(values, np.float64)
        if given.ndim and given.size != norms.size:
            raise ValueError(f"{name} has {given.size} numbers, and norm {norms.size}.")
        return np.broadcast_to(given.reshape(-1), norms.shape).copy()

    counted = np.arange(norms.size) if step is None else np.asarray(step).reshape(-1)
    steps = beside("step", counted)
    limits, losses = beside("limit", limit), beside("loss", loss)
    scales = scale_under(norms, limits) if scale is None else beside("scale", scale)
    runs = np.zeros(norms.size, np.int64)
    return Record(steps.astype(np.int64), norms, limits, scales, losses, runs)


def scale_under(norm: Floats, limit: Floats) -> Floats:
    """Return the factors that follow from limits; NaN where the limit is not known."""
    with np.errstate(all="ignore"):
        scale = clip_scale(norm, np.where(np.isnan(limit), np.inf, limit), np)
    return np.where(np.isnan(limit), np.nan, scale)
