"""AGC: a limit that is a fraction of the parameter's norm."""

import math
from dataclasses import dataclass

from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check


@dataclass(frozen=True)
class Relative(Rule):
    r"""Keep each gradient below a fraction of the parameter that it belongs to (AGC).

    $g_r \leftarrow g_r \cdot \min(1, \lambda \max(\lVert w_r \rVert, \varepsilon)
    / \lVert g_r \rVert)$

    A unit $r$ is a row of the first axis, or of another: vectors and scalars are one
    unit. The paper leaves the final linear layer unclipped: hand over the other
    parameters.

    Args:
        ratio: $\lambda$, the largest gradient norm per parameter norm, above 0.
        over: `"unit"` (the paper) or `"tensor"`.
        eps: The norm that smaller parameters count for, in the unit of the parameter
            norm, above 0, so that weights that start at zero can still move.
        axis: As for `Norm`: 0 in torch's layout, -1 in that of JAX and Keras.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a ratio or `eps` that is not above 0, or another scope.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> weight = np.array([[3.0, 4.0], [0.0, 0.0]])
        >>> grads, _ = gc.clip(np.ones((2, 2)), gc.Relative(0.1), params=weight)
        >>> grads.round(5).tolist()
        [[0.35355, 0.35355], [7e-05, 7e-05]]

    Reference:
        Brock, De, Smith, Simonyan: High-performance large-scale image recognition
        without normalization. arXiv 2102.06171, 2021.
    """

    ratio: float = 0.01
    over: Scope = "unit"
    eps: float = 1e-3
    axis: int = 0

    scopes = ("unit", "tensor")
    needs_weight = True

    def __post_init__(self) -> None:
        """Check the ratio and the floor."""
        super().__post_init__()
        check(self, "ratio", ABOVE_ZERO, math.inf, "the ratio is above 0.")
        check(self, "eps", ABOVE_ZERO, LARGEST, "eps is above 0, and finite.")

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the fraction of the parameter norms."""
        return self.ratio * seen.xp.clip(seen.weight, self.eps, None), state


AGC = Relative
