"""The array namespace for single numbers, with which array libraries are slow."""

import math
from typing import Any

import array_api_compat.numpy as xp_numpy
import numpy as np

from gradclip.rules import Rule, stages

_XP: Any = xp_numpy
_TRUE, _FALSE = np.bool_(True), np.bool_(False)


def one_number(rule: Rule) -> bool:
    """Return whether a rule of ours needs one norm, and has plain numbers itself.

    Those of others may ask for more of the array API than single numbers have.
    """
    parts = [part for stage in stages(rule) for part in (stage, *stage.within())]
    return all(
        type(part).__module__.startswith("gradclip.")
        and part.over == "all"
        and not (part.needs_weight or part.by_part)
        and not any(hasattr(x, "shape") for x in vars(part).values())
        for part in parts
    )


class Scalars:
    """The array namespace for one number at a time.

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
        # NumPy has one object for each truth value, so that a look at it is enough.
        chosen = a if condition is _TRUE else b
        if condition is not _TRUE and condition is not _FALSE:
            return np.where(condition, a, b)
        if type(chosen) is np.float64:
            return chosen
        # Beside an array, a number has to take its shape.
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
        return x if x is _TRUE or x is _FALSE else np.all(x)

    @staticmethod
    def any(x: Any) -> Any:
        """Return whether any of them holds."""
        return x if x is _TRUE or x is _FALSE else np.any(x)

    def ones_like(self, x: Any) -> Any:
        """Return 1 or true, or an array of them: the same one each time."""
        if x is _TRUE or x is _FALSE:
            return _TRUE
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


NUMBERS = Scalars()
"""One for all who have numbers alone; what is kept of arrays is not for threads."""
