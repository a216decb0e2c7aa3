"""From a norm to a scale: the formula, and the report of what was done."""

import math
from typing import Any, NamedTuple

from gradclip.host import norm_of_cells, smallest, to_numpy
from gradclip.rules import Array, Measured, Rule, State, usable


class Info(NamedTuple):
    """What one clipping did; the type of the numbers is that of the gradients' library.

    `norm`, `limit`, `scale` and `norm_after` are 0-d for `over="all"` and for
    elements (there the largest modulus counts), else one per tensor or unit.
    """

    norm: Any
    """The norm before clipping."""
    limit: Any
    """The largest norm let through at this step."""
    scale: Any
    """The factor applied, 1 where nothing was."""
    finite: Any
    """Whether the gradients came without NaN and infinity, which may be cleared."""
    clipped: Any
    """Whether anything was clipped."""
    norm_after: Any
    """The norm after clipping; 0 where the step was skipped."""
    skipped: Any = 0
    """How many steps a clipper has skipped, this one included; pure functions say 0."""
    kept: Any = True
    """Whether the step goes ahead: not where a policy or `Skip` drops it."""

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        r"""Return the report as plain numbers, as loggers take them.

        Several cells become one number: $\lVert (n_1, n_2, …) \rVert_2$ for norms and
        limits, and the smallest scale; a flag is 1 or 0. A history does the same, with
        the order of the rule's norms.

        Args:
            prefix: Put before each name.

        Returns:
            `norm`, `limit`, `scale`, `norm_after`, `clipped`, `finite` and `kept`, and
            `skipped`, the count of skipped steps. The host waits for an accelerator.

        Example:
            >>> import gradclip as gc, numpy as np
            >>> _, info = gc.clip(np.array([6.0, 8.0]), gc.Norm(5.0))
            >>> numbers = info.to_dict(prefix="grad/")
            >>> numbers["grad/norm"], numbers["grad/scale"], numbers["grad/clipped"]
            (10.0, 0.5, 1.0)
        """
        host = {name: to_numpy([x])[0] for name, x in self._asdict().items()}
        fine = bool(host["finite"])
        lengths = {"norm": fine, "limit": True, "norm_after": fine}
        return {
            prefix + name: norm_of_cells(x, finite=lengths[name])
            if name in lengths
            else smallest(x)
            for name, x in host.items()
        }


def clip_scale(norm: Array, limit: Array, xp: Any, most: Array | float = 1.0) -> Array:
    """Return `min(1, limit / norm)`; 1 for a norm that is 0 or not finite.

    `most` takes the place of the 1 in it for rules that may stretch.
    """
    # Infinity through infinity would be NaN for everything (optax#1752).
    known = usable(norm)
    size = xp.where(known, norm, 1.0)
    # The quotient of an infinite limit has no derivative.
    ratio = xp.where(limit < math.inf, limit, size) / size
    if not isinstance(most, float) or most > 1:
        # Stretched from 1e-310, zeros would be 0 times infinity.
        ratio = xp.clip(ratio, None, float(xp.finfo(ratio.dtype).max))
    return xp.where(known, xp.clip(ratio, None, most), 1.0)


def lawful(limit: Array, norm: Array, xp: Any) -> Array:
    """Return a limit that reverses nothing: 0 for one that is negative or NaN.

    Where its value can be read, it is refused before; compiled code cannot read it.
    """
    # A rule of one's own may have a number, which torch does not choose by.
    limit = xp.full_like(norm, limit) if type(limit) in (int, float) else limit
    return xp.where(limit >= 0, limit, 0.0)


def decide(rule: Rule, seen: Measured, state: State) -> tuple[Info, State]:
    """Ask a rule for the limit; return what follows from it, and the new state.

    The NaN of cells that are absent does not make the step non-finite.
    """
    xp = seen.xp
    limit, state = rule.update(seen, state)
    limit = lawful(limit, seen.norm, xp)
    scale = clip_scale(seen.norm, limit, xp, rule.most(seen))
    # Norms are never below 0, so that one comparison finds NaN and infinity.
    finite = seen.norm < math.inf
    after = xp.where(finite & (scale != 1), limit, seen.norm)
    whole = xp.all(finite if seen.absent is None else finite | seen.absent)
    clipped = xp.any(scale != 1)
    kept = ~clipped if rule.drops else xp.ones_like(clipped)
    if rule.drops:
        scale = xp.where(kept, scale, 0.0)
    return Info(seen.norm, limit, scale, whole, clipped, after, kept=kept), state
