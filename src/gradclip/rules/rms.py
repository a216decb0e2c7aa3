"""RMS clipping: a limit on the root mean square, for tensors of unlike sizes."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradclip.rules.base import Array, Measured, Rule, Scope, Shape, State
from gradclip.rules.limits import Limit, Limited, check_limit, limit_at
from gradclip.rules.parts import constants


@dataclass(frozen=True)
class RMS(Limited):
    r"""Rescale so that the root mean square of the elements is at most a limit.

    $g \leftarrow g \cdot \min(1, d \sqrt{n} / \lVert g \rVert)$ for $n$ elements

    `Norm` holds a bias of 10 elements to the limit of a matrix of a million; here both
    may have the same size an element. Norms and limits are reported as norms: the limit
    is $d \sqrt{n}$. Parameters without a gradient count as zeros.

    Args:
        limit: $d$, the largest root mean square let through, in the unit of one element
            of the gradient, above 0: a number, a 0-d array, or a function of the step
            that returns one.
        over: Each `"tensor"` (as optax does) or `"all"`.

    Raises:
        TypeError: For a limit that is not a number, a 0-d array or a function.
        ValueError: For a limit that is not above 0, or another scope.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> grads = [np.full(4, 3.0), np.full((50, 2), 0.5)]
        >>> clipped, info = gc.clip(grads, gc.RMS(1.0))
        >>> clipped[0].round(4).tolist(), info.norm.tolist(), info.limit.tolist()
        ([1.0, 1.0, 1.0, 1.0], [6.0, 5.0], [2.0, 10.0])

    Reference:
        optax, `clip_by_block_rms`, github.com/google-deepmind/optax; it is the update
        clipping of Shazeer, Stern: Adafactor: adaptive learning rates with sublinear
        memory cost. arXiv 1804.04235, 2018.
    """

    limit: Limit
    over: Scope = "tensor"
    sizes: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    by_place = True
    needs_shape = True

    def __post_init__(self) -> None:
        """Check the scope and the limit."""
        super().__post_init__()
        check_limit(self, "limit")

    def bind(self, names: Sequence[str], shapes: Sequence[Shape]) -> Rule:
        """Return the rule that knows how many elements each tensor has."""
        # `replace` refuses fields that are no arguments.
        bound = copy.copy(self)
        object.__setattr__(bound, "sizes", tuple(map(math.prod, shapes)))
        return bound

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the norm of as many elements of the size of the limit."""
        sizes = self.sizes if self.over == "tensor" else (sum(self.sizes),)
        roots = [math.sqrt(max(size, 1)) for size in sizes]
        root = roots[0] if self.over == "all" else constants(roots, seen.norm, seen.xp)
        return root * limit_at(seen, self.limit), state
