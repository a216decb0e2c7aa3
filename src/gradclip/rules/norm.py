"""Norm clipping: a limit that is given."""

import math
from dataclasses import dataclass

from gradclip.rules.base import Array, Measured, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, check
from gradclip.rules.limits import Limit, Limited, check_limit, limit_at


@dataclass(frozen=True)
class Norm(Limited):
    r"""Rescale so that the norm is at most a limit that you give.

    $g \leftarrow g \cdot \min(1, c / \lVert g \rVert_p)$

    Args:
        limit: The largest norm let through, in the unit of the gradient norm,
            above 0: a number, a 0-d array, or a function of the step that returns one.
            `float("inf")` records norms and never clips.
        over: What one norm is taken over: `"all"` gradients together, each
            `"tensor"`, each `"unit"` (row of one axis), each `"element"`, or each
            `"singular"` value of a matrix (more axes than two are laid flat after the
            first; that of a vector is its norm).
        p: The order of the norm, above 0; `float("inf")` is the largest modulus.
        axis: The axis that counts the units: 0 in torch's layout, -1 in that of JAX
            and Keras. Vectors and scalars are one unit.

    Raises:
        TypeError: For a limit that is not a number, a 0-d array or a function.
        ValueError: For a limit or `p` that is not above 0, or an unknown scope.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([3.0, 4.0]), gc.Norm(1.0))
        >>> grads.round(4).tolist(), float(info.norm)
        ([0.6, 0.8], 5.0)

    Reference:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural
        networks. arXiv 1211.5063, 2013.
    """

    limit: Limit
    over: Scope = "all"
    p: float = 2.0
    axis: int = 0

    scopes = ("all", "tensor", "unit", "element", "singular")

    def __post_init__(self) -> None:
        """Check the scope, the limit and the order of the norm."""
        super().__post_init__()
        check_limit(self, "limit")
        check(self, "p", ABOVE_ZERO, math.inf, "the order of a norm is above 0.")

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit as it was given."""
        return limit_at(seen, self.limit), state
