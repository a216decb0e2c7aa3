"""SPAM: a limit for each element that is a multiple of its own root mean square."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from gradclip.rules.averages import root_moved, weight_of
from gradclip.rules.base import Array, Measured, Rule, Scope, State
from gradclip.rules.checks import ABOVE_ZERO, LARGEST, check, choose
from gradclip.rules.keeping import usable


@dataclass(frozen=True)
class Moment(Rule):
    r"""Limit each element to a multiple of its own root mean square (SPAM, AdamWClip).

    $g_i \leftarrow \operatorname{sign}(g_i) \min(|g_i|, k \sqrt{v_i})$, and
    $v_i \leftarrow \beta v_i + (1 - \beta) g_i^2$ of what was let through

    $v$ is the second moment of Adam. The memory takes twice the room of the gradients.
    An element that is 0 teaches nothing, and the first one that is not is let through,
    so that the row of a rare token is not frozen. In the warm-up nothing is clipped,
    but what the memory takes in is, so that a spike there is forgotten.

    Args:
        ratio: $k$, how many times the root of its second moment an element may be,
            above 0: $\sqrt{\theta}$ with the $\theta = 5000$ of SPAM; 3 for
            AdamWClip.
        decay: $\beta$, how much of the second moment is kept at each step, in (0, 1).
        warmup: How many steps are watched before any element is clipped, at least 1.
        corrected: Whether the limit uses $v_i / (1 - \beta^t)$, as AdamWClip does, so
            that it is a number of deviations from the start; SPAM takes $v$ as it is.
        over: Only `"element"`.
        memory: `"own"`, or `"optimizer"` for the second moment that Adam keeps anyway,
            which takes no room. That is for `gradclip.torch.attach` and torch's Adam,
            AdamW, NAdam and RAdam, whose decay is $\beta$ then.

    Raises:
        TypeError: For an array in place of a number.
        ValueError: For a number outside its range, named in the message.

    Example:
        >>> import gradclip as gc, numpy as np
        >>> clipper = gc.Clipper(gc.Moment(3.0, warmup=1, corrected=True))
        >>> for g in ([1.0, 0.1], [-1.0, 0.1], [50.0, 0.1]):
        ...     print(clipper.clip(np.array(g))[0].round(3).tolist())
        [1.0, 0.1]
        [-1.0, 0.1]
        [3.0, 0.1]

    Reference:
        Huang et al.: SPAM: spike-aware Adam with momentum reset for stable LLM
        training. arXiv 2501.06842, 2025. AdamWClip 0.1.4, pypi.org/project/AdamWClip.
    """

    ratio: float = 5000**0.5
    decay: float = 0.999
    warmup: int = 20
    corrected: bool = False
    over: Scope = "element"
    memory: Literal["own", "optimizer"] = "own"

    scopes = ("element",)
    by_part = True
    stateful = True

    def __post_init__(self) -> None:
        """Check every number."""
        super().__post_init__()
        check(self, "ratio", ABOVE_ZERO, LARGEST, "the ratio is above 0.")
        check(self, "decay", ABOVE_ZERO, 1 - 2**-53, "the decay lies in (0, 1).")
        check(self, "warmup", 1, sys.maxsize, "at least one step is watched first.")
        choose(self, "memory", ("own", "optimizer"))
        object.__setattr__(self, "borrows", self.memory == "optimizer")

    @property
    def kind(self) -> str:
        """What a saved memory has to match: there is none if it is the optimizer's."""
        return f"{super().kind} of the optimizer" if self.borrows else super().kind

    def init(self, norm: Array, xp: Any) -> State:
        """Return a memory of nothing."""
        if self.borrows:
            raise ValueError(
                f"{self!r} reads what Adam remembers, and there is no optimizer here; "
                "use gradclip.torch.attach(optimizer, rule), or memory='own'."
            )
        return {"root": xp.zeros_like(norm), "count": xp.sum(xp.zeros_like(norm))}

    def update(self, seen: Measured, state: State) -> tuple[Array, State]:
        """Return the limit of each element, and its moment with it taken in."""
        xp, n, root, count = seen.xp, seen.norm, state["root"], state["count"]
        known, met = usable(n), root > 0
        warming, weight = count < self.warmup, xp.sqrt(weight_of(count, self.decay, xp))
        # In the warm-up an uncorrected moment is too small to tell what is a spike.
        corrects = (count > 0) & (warming | self.corrected)
        typical = root / xp.where(corrects, weight, 1.0)
        limit = xp.where(met, self.ratio * typical, math.inf)

        taken = xp.where(n > limit, limit, n)
        # Only now: in the warm-up the memory is limited, and the gradient is not.
        limit = xp.where(warming, math.inf, limit)
        moved = root_moved(root, taken, 1 - self.decay, xp)
        # One that is met late counts as if it had always been of this size.
        first = xp.sqrt(weight_of(count + 1, self.decay, xp)) * taken
        updated = {
            "root": xp.where(known, xp.where(met, moved, first), root),
            "count": xp.where(usable(seen.top), count + 1, count),
        }
        return limit, updated


SPAM = Moment
