"""Limits that the caller gives: a number, or a function of the step."""

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from gradclip.rules.base import Array, Measured, Rule
from gradclip.rules.checks import plainly

Limit: TypeAlias = float | Array | Callable[[Any], Any]


class Limited(Rule):
    """A rule whose limit the caller gives."""

    limit: Limit

    @property
    def stateful(self) -> bool:
        """A schedule needs the step, so that something has to count the steps."""
        return callable(self.limit)


def check_limit(rule: Rule, name: str) -> None:
    """Refuse a limit that is negative, zero or NaN; infinity only records."""
    value = readable(rule, name)
    if value is not None and not value > 0:
        raise ValueError(
            f"{type(rule).__name__}({name}={getattr(rule, name)!r}): the limit is "
            "above 0; use float('inf') to record norms without clipping."
        )


def readable(rule: Rule, name: str) -> float | None:
    """Return a limit as a number; None where there is none yet, or it has a price."""
    value = plainly(rule, name)
    if callable(value):
        return None
    if hasattr(value, "shape"):
        return _read(rule, name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{type(rule).__name__}({name}={value!r}): the limit is a number, a 0-d "
            "array, or a function of the step."
        )
    return value


def _read(rule: Rule, name: str, value: Array) -> float | None:
    """Return the number in an array, if it is known to the host."""
    if tuple(value.shape) != ():
        raise ValueError(
            f"{type(rule).__name__}({name}={value!r}): the limit is one number; this "
            f"array has shape {tuple(value.shape)}."
        )
    # Reading a number off an accelerator would make the host wait for it, and compiled
    # code has none yet.
    torch = sys.modules.get("torch")
    compiled = torch is not None and torch.compiler.is_compiling()
    if compiled or "cpu" not in str(getattr(value, "device", "cpu")).lower():
        return None
    try:
        return float(value)
    except TypeError:
        # Traced by jit, so that there is no number to check yet.
        return None


def check_fixed(rule: Rule, name: str) -> None:
    """Refuse a limit like any other, and one that changes with the step."""
    if callable(value := getattr(rule, name)):
        raise TypeError(
            f"{type(rule).__name__}({name}={value!r}): this limit is a number; for one "
            "that changes with the step, chain the rule with Norm(schedule)."
        )
    check_limit(rule, name)


def limit_at(seen: Measured, limit: Limit) -> Array:
    """Return the limit at this step in the shape of the norms; ask a schedule here."""
    if id(limit) in seen.scheduled:
        limit = seen.scheduled[id(limit)]
    elif callable(limit):
        limit = ask_schedule(limit, seen.step, seen.norm)
    return seen.xp.zeros_like(seen.norm) + limit


def ask_schedule(schedule: Callable[[Any], Any], step: Any, like: Array) -> Any:
    """Return what a schedule says: a number, or an array of the library in use."""
    value = schedule(step)
    if not isinstance(value, (int, float)) and getattr(value, "shape", None) != ():
        raise TypeError(
            f"the schedule {schedule!r} gives {value!r} at step {step}; a limit is a "
            "number or a 0-d array. Nothing was changed."
        )
    return read_if_foreign(value, like)


def read_if_foreign(value: Any, like: Array) -> Any:
    """Return a number; one in an array of another library, as optax gives, is read."""
    foreign = hasattr(value, "shape") and _library(value) != _library(like)
    return float(value) if foreign else value


def _library(x: Any) -> str:
    return type(x).__module__.partition(".")[0].removesuffix("lib")
