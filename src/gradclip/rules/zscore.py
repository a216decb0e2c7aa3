"""ZClip: a limit some moving deviations above the moving mean."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from gradclip.rules.averages import root_moved
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check, choose
from gradclip.rules.keeping import held, usable
from gradclip.rules.limits import check_fixed


@dataclass(frozen=True)
class ZScore(Rule):
    r"""Pull a norm that stands out from its moving average back towards it (ZClip).

    With $z_t = (\lVert g_t \rVert - \mu) / \sigma$, a norm with $z_t > z$ gets the
    limit $\mu + z^2 \sigma / z_t$; the others pass. $\mu$ and $\sigma^2$ start from the
    first `warmup` norms and then follow the norms that this limit let through; as in
    the paper's code, `max_limit` does not hold what is learnt.
    Multiplying all gradients by a constant changes no scale.

    Args:
        z: How many standard deviations may pass, above 0.
        decay: How much of $\mu$ and $\sigma^2$ is kept at each step, in (0, 1].
        warmup: How many steps are watched first, at least 1, not counting those whose
            norm is 0 or not finite; nothing but `max_limit` clips during them.
        max_limit: A fixed limit on top, in the unit of the gradient norm, above 0. (The
            paper's code uses 1.0.)
        over: `"all"` or each `"tensor"`.
        mode: The limit of a norm that stands out: `"adaptive"` is the one above,
            `"mean"` is $\mu$, and `"threshold"` is $\mu + z \sigma$ (which the paper's
            code calls percentile).

    Raises:
        TypeError: For a limit that is not a number or a 0-d array.
        ValueError: For a number outside its range, named in the message, or an unknown
            scope or mode.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.ZScore(z=2.0, warmup=2))
        >>> norms = [1.0, 3.0, 2.5, 50.0]
        >>> [round(float(clipper.clip(np.array([n]))[1].norm_after), 3) for n in norms]
        [1.0, 3.0, 2.5, 2.096]

    Reference:
        Kumar, Owen, Roy Chowdhury, Güra: ZClip: adaptive spike mitigation for LLM
        pre-training. arXiv 2504.02507, 2025.
    """

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    max_limit: float | None = None
    over: Scope = "all"
    mode: Literal["adaptive", "mean", "threshold"] = "adaptive"

    stateful = True

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        check(self, "z", ABOVE_ZERO, LARGEST, "the deviations let through are above 0.")
        check(self, "decay", ABOVE_ZERO, 1.0, "the decay lies in (0, 1].")
        check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")
        choose(self, "mode", ("adaptive", "mean", "threshold"))
        if self.max_limit is not None:
            check_fixed(self, "max_limit")

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        return {name: xp.zeros_like(norm) for name in ("mean", "std", "count")}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit, and the statistics with the clipped norm taken in."""
        xp, n = seen.xp, seen.norm
        mean, std, count = state["mean"], state["std"], state["count"]
        known, warming = usable(n), count < self.warmup

        limit = xp.where(warming, math.inf, self._limit(seen, mean, std))

        # As in the paper's code, `max_limit` does not hold what is learnt.
        taken = xp.where(n > limit, limit, n)
        new = xp.where(warming, 1 / (count + 1), 1 - self.decay)
        new_mean = mean + new * (taken - mean)
        after, before = xp.abs(taken - new_mean), xp.abs(taken - mean)
        # The sample variance while it is collected, the paper's moving one after that.
        deviation = xp.sqrt(after) * xp.sqrt(xp.where(warming, before, after))
        updated = {
            "mean": new_mean,
            "std": root_moved(std, deviation, new, xp),
            "count": count + 1,
        }
        if self.max_limit is not None:
            limit = xp.clip(limit, None, self.max_limit)
        return limit, held(updated, state, known, xp)

    def _limit(self, seen: Measured, mean: Array, std: Array) -> Array:
        """Return the limit after the warm-up."""
        excess, spread = seen.norm - mean, self.z * std
        out = excess > spread
        if self.mode == "threshold":
            return mean + spread
        if self.mode == "mean":
            return seen.xp.where(out, mean, mean + spread)
        # mean + z² σ / z_t without a division by σ, which is 0 for constant norms.
        share = spread / seen.xp.where(out, excess, 1.0)
        return mean + seen.xp.where(out, spread * share, spread)


ZClip = ZScore
