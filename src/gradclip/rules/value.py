"""Value clipping: a limit for each element."""

import math
from dataclasses import dataclass

from gradclip.rules.base import Array, Measured, Scope, State
from gradclip.rules.limits import Limit, Limited, check_limit, limit_at


@dataclass(frozen=True)
class Value(Limited):
    r"""Clamp each element to a limit: a complex one by its modulus, phase kept.

    $g_i \leftarrow \max(-c, \min(c, g_i))$

    Args:
        limit: The largest modulus let through, in the unit of one element of the
            gradient, above 0: a number, a 0-d array, or a function
            of the step that returns one.
        over: Only `"element"`; for a norm over more, see `Norm`.

    Raises:
        TypeError: For a limit that is not a number, a 0-d array or a function.
        ValueError: For a limit that is not above 0.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([-3.0, 0.5]), gc.Value(1.0))
        >>> grads.tolist(), float(info.norm), float(info.scale)
        ([-1.0, 0.5], 3.0, 0.3333333333333333)

    Reference:
        Mikolov: Statistical language models based on neural networks. PhD thesis,
        Brno University of Technology, 2012.
    """

    limit: Limit
    over: Scope = "element"

    scopes = ("element",)
    p = math.inf

    def __post_init__(self) -> None:
        """Check the limit."""
        super().__post_init__()
        check_limit(self, "limit")

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit as it was given."""
        return limit_at(seen, self.limit), state
