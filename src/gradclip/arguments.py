"""What every front is given: refused before anything is kept or changed."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from gradclip.rules import Rule


def without_memory(rule: Rule, call: str, instead: str) -> None:
    """Refuse what depends on earlier steps, where one call is all there is."""
    if rule.stateful:
        raise TypeError(
            f"{call}: {rule!r} depends on the steps before, which one call does not "
            f"know; use {instead}."
        )


def check_rule(rule: Any) -> Rule:
    """Return the rule, or say what one looks like."""
    if not isinstance(rule, Rule):
        raise TypeError(f"{rule!r} is not a rule; use one such as gradclip.Norm(1.0).")
    return rule


def check_alike(grads: Sequence[Any], params: Sequence[Any]) -> None:
    """Refuse parameters that are not those of the gradients."""
    shapes, given = (
        [tuple(getattr(x, "shape", ())) for x in part] for part in (grads, params)
    )
    if given != shapes:
        raise ValueError(
            f"the parameters have shapes {given}, but the gradients {shapes}; arrange "
            "them alike."
        )


def at_least(least: float, **named: Any) -> None:
    """Refuse numbers below the least one that has a meaning; an integer for counts."""
    counts = isinstance(least, int)
    kind: Any
    kind, words = (Integral, "a whole number") if counts else (Real, "a number")
    for name, value in named.items():
        # Infinity passes for a whole number, where it means never.
        if not (isinstance(value, kind) or value == math.inf) or not value >= least:
            raise ValueError(f"{name}={value!r}: it is {words}, at least {least}.")


def begin(history: Any, rule: Rule) -> None:
    """Tell a history what clips in the steps to come; None is no history.

    Raises:
        TypeError: For what is no history, such as the path of one.
    """
    if history is None:
        return
    if not hasattr(history, "begin"):
        raise TypeError(
            f"history={history!r} is {type(history).__name__}; use "
            "history=gradclip.History(path)."
        )
    history.begin(rule)
