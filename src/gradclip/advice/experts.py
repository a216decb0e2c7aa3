"""Published rules of thumb for a limit, and what they would clip."""

from dataclasses import dataclass

import numpy as np

from gradclip.advice.evidence import share_above
from gradclip.record import Floats


@dataclass(frozen=True)
class Expert:
    """A limit, or a range of them, by a published rule of thumb."""

    name: str
    limit: float
    clip_rate: float
    source: str


def experts(steady: Floats) -> tuple[Expert, ...]:
    """Return the rules of thumb for norms after the warm-up."""
    if not steady.size:
        return ()
    ordered = np.sort(steady)
    # Of norms near 1e308, the sum overflows.
    mean = float(np.mean(ordered / ordered[-1]) * ordered[-1])
    median = float(np.median(steady))
    rows = (
        ("half the mean", mean / 2, "Pascanu 2013, lower end"),
        ("ten times the mean", mean * 10, "Pascanu 2013, upper end"),
        ("90th percentile", float(np.quantile(ordered, 0.9)), "tuning playbook"),
        ("twice the median", 2 * median, "icefall"),
        ("10th percentile", float(np.quantile(ordered, 0.1)), "AutoClip 2020"),
    )
    return tuple(
        Expert(name, limit, float(share_above(ordered, limit)), source)
        for name, limit, source in rows
    )
