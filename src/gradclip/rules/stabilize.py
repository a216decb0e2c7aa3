"""AdaGN: a length that is the ratio of two moments of the norm."""

from dataclasses import dataclass
from typing import Any

from gradclip.rules.averages import root_moved, weight_of
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import LARGEST, check
from gradclip.rules.keeping import held, usable


@dataclass(frozen=True)
class Stabilize(Rule):
    r"""Bring each gradient to the ratio of the moving moments of its norm (AdaGN).

    $g \leftarrow g \cdot \hat m_t / ((\sqrt{\hat v_t} + \varepsilon)
    \lVert g_t \rVert)$ with $m_t = \gamma_1 m_{t-1} + (1 - \gamma_1)
    \lVert g_t \rVert$ and $v_t = \gamma_2 v_{t-1} + (1 - \gamma_2)
    \lVert g_t \rVert^2$, each divided by $1 - \gamma^t$

    The length is about 1 and has no unit: the same for a loss of any scale, so that
    `limit` in an `Info` is not comparable with the norm. After many norms that are
    alike, one of any size ends at most at
    $\sqrt{\gamma_1^2 / \gamma_2 + (1 - \gamma_1)^2 / (1 - \gamma_2)}$ (by default
    1.20), and a huge one at $(1 - \gamma_1) / \sqrt{1 - \gamma_2}$ (0.95). Where
    $\gamma_1^2 < \gamma_2$, norms of any sequence end below
    $(1 - \gamma_1) / \sqrt{(1 - \gamma_2) (1 - \gamma_1^2 / \gamma_2)}$ (1.41).

    Args:
        decay: $\gamma_1$, how much of the first moment is kept at each step, in [0, 1).
        square_decay: $\gamma_2$, how much of the second moment is kept, in [0, 1).
        over: Each `"tensor"` (the paper) or `"all"`.
        eps: $\varepsilon$, in the unit of the gradient norm, at least 0. (The
            paper's code uses 1e-8.)

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Stabilize())
        >>> norms = [0.02, 0.02, 20.0, 0.02]
        >>> infos = [clipper.clip(np.array([n]))[1] for n in norms]
        >>> [round(float(info.norm_after[0]), 3) for info in infos]
        [1.0, 1.0, 0.753, 0.542]

    Reference:
        Huang et al.: Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam
        (later: GradientStabilizer: fix the norm, not the gradient).
        arXiv 2502.17055, 2025.
    """

    decay: float = 0.7
    square_decay: float = 0.9
    over: Scope = "tensor"
    eps: float = 0.0

    stretches = True
    stateful = True

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        for name in ("decay", "square_decay"):
            check(self, name, 0.0, 1.0 - 2**-53, "the decay lies in [0, 1).")
        check(self, "eps", 0.0, LARGEST, "eps is 0 or above, and finite.")

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        return {name: xp.zeros_like(norm) for name in ("mean", "root", "count")}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the ratio of the moments with the new norm among them."""
        xp, n, a, b = seen.xp, seen.norm, self.decay, self.square_decay
        known, count = usable(n), state["count"] + 1
        mean = state["mean"] + (1 - a) * (n - state["mean"])
        root = root_moved(state["root"], n, 1 - b, xp)
        updated = {"mean": mean, "root": root, "count": count}
        spread = root / xp.sqrt(weight_of(count, b, xp)) + self.eps
        length = mean / weight_of(count, a, xp) / xp.where(known, spread, 1.0)
        # The choice keeps XLA from making one division of this and that by the norm.
        return xp.where(known, length, 1.0), held(updated, state, known, xp)


AdaGN = Stabilize
