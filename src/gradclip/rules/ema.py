"""AdaGC: a limit that is a multiple of the moving average."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from gradclip.rules.averages import added
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check
from gradclip.rules.keeping import held, usable
from gradclip.rules.limits import check_fixed
from gradclip.rules.parts import norm_of


@dataclass(frozen=True)
class EMA(Rule):
    r"""Limit each norm to a multiple of its own moving average (AdaGC).

    $c_t = \rho \gamma_{t-1}$, and
    $\gamma_t = \beta \gamma_{t-1} + (1 - \beta) \min(\lVert g_t \rVert, c_t)$

    In the first `warmup` steps $\gamma$ is the smallest norm let through so far, and
    the gradients together are held to `warmup_limit`. Each tensor counts its own steps,
    and a norm that is 0, NaN or infinite is not one: a tensor without a gradient at
    first is not frozen by it.

    Args:
        ratio: $\rho$, how many times its average a norm may be, above 0.
        decay: $\beta$, how much of the average is kept at each step, in [0, 1].
        warmup: How many steps come before the average is used, at least 1.
        over: Each `"tensor"` (the paper) or `"all"`.
        warmup_limit: The largest global norm during the warm-up, in the unit of the
            gradient norm, above 0. (Ports of the method use 1.0.) None clips nothing
            then.

    Raises:
        TypeError: For a limit that is not a number or a 0-d array.
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.EMA(warmup=2))
        >>> infos = [clipper.clip(np.array([n]))[1] for n in (3.0, 2.0, 50.0)]
        >>> [round(float(info.norm_after[0]), 3) for info in infos]
        [3.0, 2.0, 2.1]

    Reference:
        Wang et al.: AdaGC: improving training stability for large language model
        pretraining. arXiv 2502.11034, 2025.
    """

    ratio: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    over: Scope = "tensor"
    warmup_limit: float | None = None

    stateful = True

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        check(self, "ratio", ABOVE_ZERO, LARGEST, "the ratio is above 0.")
        check(self, "decay", 0.0, 1.0, "the decay lies in [0, 1].")
        check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")
        if self.warmup_limit is not None:
            check_fixed(self, "warmup_limit")

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        return {name: xp.zeros_like(norm) for name in ("ema", "rest", "count")}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit, and the average with the clipped norm taken in."""
        xp, n, ema, count = seen.xp, seen.norm, state["ema"], state["count"]
        warming = count < self.warmup
        limit = xp.where(warming, self._share(seen), self.ratio * ema)

        taken = xp.where(n > limit, limit, n)
        least = xp.where((count == 0) | (taken < ema), taken, ema)
        # Not limit - ema, which in float32 has the rounding of the ratio at each step.
        gap = xp.where(n > limit, (self.ratio - 1) * ema, n - ema)
        moved, rest = added(ema, state["rest"], (1 - self.decay) * gap)
        updated = {
            "ema": xp.where(warming, least, moved),
            "rest": xp.where(warming, 0.0, rest),
            "count": count + 1,
        }
        return limit, held(updated, state, usable(n), xp)

    def _share(self, seen: Measured) -> Array:
        """Return what each norm may take of the global limit during the warm-up."""
        xp = seen.xp
        if self.warmup_limit is None:
            return xp.full_like(seen.norm, math.inf)
        total = norm_of(seen.norm, xp)
        return self.warmup_limit * (seen.norm / xp.where(total > 0, total, 1.0))


AdaGC = EMA
