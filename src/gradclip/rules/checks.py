"""Arguments of rules are refused where they are given, with what to do instead."""

import math
import sys
from typing import Any

import numpy as np

from gradclip.rules.base import Rule

ABOVE_ZERO = math.ulp(0.0)
LARGEST = sys.float_info.max


def plainly(rule: Rule, name: str) -> Any:
    """Return an argument; a number of NumPy becomes Python's, for the rule's text."""
    value = getattr(rule, name)
    if isinstance(value, np.generic):
        value = value.item()
        object.__setattr__(rule, name, value)
    return value


def check(rule: Rule, name: str, low: float, high: float, remedy: str) -> None:
    """Refuse what is not a number from `low` to `high`; an integer for integers."""
    value = plainly(rule, name)
    kinds = int if isinstance(low, int) else (int, float)
    if hasattr(value, "shape"):
        raise TypeError(
            f"{type(rule).__name__}({name}={value!r}): this is a plain number, known "
            "when the rule is made; limits may be arrays, or functions of the step."
        )
    # True is an integer to Python.
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{type(rule).__name__}({name}={value!r}): {remedy}")


def choose(rule: Rule, name: str, known: tuple[str, ...]) -> None:
    """Refuse a word that has no meaning here."""
    value = getattr(rule, name)
    if value not in known:
        words = ", ".join(map(repr, known))
        raise ValueError(
            f"{type(rule).__name__}({name}={value!r}): use one of {words}."
        )
