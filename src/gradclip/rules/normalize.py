"""Normalized gradients: a length that they are brought to."""

from dataclasses import dataclass

from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check


@dataclass(frozen=True)
class Normalize(Rule):
    r"""Rescale to a length, up as well as down; a zero gradient stays zero.

    $g \leftarrow g \cdot \ell / (\lVert g \rVert + \varepsilon)$

    Args:
        length: The norm afterwards, in the unit of the gradient norm, above 0 and
            finite.
        over: As for `Norm`; over each `"element"` it leaves the sign.
        eps: What the norm is padded with, in the unit of the gradient norm, at least 0.
            Small norms stay small.
        axis: As for `Norm`.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a length that is not above 0, or an `eps` below 0.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads, info = gc.clip(np.array([0.3, 0.4]), gc.Normalize())
        >>> grads.round(4).tolist(), float(info.scale)
        ([0.6, 0.8], 2.0)

    Reference:
        Cutkosky, Mehta: Momentum improves normalized SGD. arXiv 2002.03305, 2020.
    """

    length: float = 1.0
    over: Scope = "all"
    eps: float = 0.0
    axis: int = 0

    scopes = ("all", "tensor", "unit", "element")
    stretches = True

    def __post_init__(self) -> None:
        """Check the length and the padding."""
        super().__post_init__()
        check(self, "length", ABOVE_ZERO, LARGEST, "the length is above 0 and finite.")
        check(self, "eps", 0.0, LARGEST, "eps is 0 or above, and finite.")

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the length that the norm is brought to."""
        norm = seen.xp.where(seen.norm > 0, seen.norm, 1.0)
        # XLA makes one quotient of two, and norm · norm is infinite from 1.9e19 on.
        return self.length / (1 + self.eps / norm), state
