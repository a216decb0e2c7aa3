"""Spikes of a log: the steps whose norm stands out from those around it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradclip.advice.evidence import SPIKE, dead_from, spike_scores, transient_length
from gradclip.record import Floats, Record
from gradclip.rules import usable

FEWEST = 20
"""Usable norms of which nothing is said if there are fewer."""


@dataclass(frozen=True)
class Spike:
    """A step whose norm stands out from those around it."""

    step: int
    norm: float
    score: float
    """The robust z-score of the log norm; infinity for a norm that is not finite."""
    tensors: tuple[tuple[str, float], ...] = ()
    """The parameters that carried it, with their norms; where they were recorded."""

    @property
    def size(self) -> float:
        """The norm; infinity for one that is not finite."""
        return self.norm if math.isfinite(self.norm) else math.inf


def find_spikes(record: Record) -> tuple[Spike, ...]:
    """Return the steps whose norm stands out from those around it.

    Args:
        record: A record; norms that are not finite are spikes, unless most are, and
            but for those that a run which died ends with.

    Returns:
        The spikes in the order of the log.
    """
    scores = row_scores(record)
    return tuple(
        Spike(
            int(record.step[i]),
            float(record.norm[i]),
            float(scores[i]),
            _carriers(record, int(i)),
        )
        for i in np.flatnonzero(scores > SPIKE)
    )


def row_scores(record: Record) -> Floats:
    """Return how far the norm of each row stands out; of a spike, above `SPIKE`."""
    norm, known = record.norm, usable(record.norm)
    scores = np.zeros(norm.shape)
    if known.sum() >= FEWEST:
        cut = warmup_of(record, known)
        parts = (norm[known][:cut], norm[known][cut:])
        # Each phase is measured by itself, or all of a warm-up would be spikes.
        scores[known] = np.concatenate([spike_scores(part) for part in parts])
    # Where most norms are infinite, the run is broken, and none of them is a spike.
    bad = ~np.isfinite(norm)
    if bad.sum() <= norm.size / 2:
        scores[bad & alive(record)] = math.inf
    return scores


def alive(record: Record) -> NDArray[np.bool_]:
    """Return which rows lie before the end of their run, if it ends dead."""
    found = np.ones(record.norm.shape, bool)
    for name in np.unique(record.run):
        rows = np.flatnonzero(record.run == name)
        found[rows[dead_from(record.norm[rows], record.loss[rows]) :]] = False
    return found


def _carriers(record: Record, i: int) -> tuple[tuple[str, float], ...]:
    """Return the three largest parameters of a row, where they were recorded."""
    tensors = record.tensors
    if tensors is None:
        return ()
    same = (tensors.step == record.step[i]) & (tensors.run == record.run[i])
    at = np.flatnonzero(same)
    if not at.size:
        return ()
    found = tensors.norm[at[0]]
    # A parameter that is not finite carried the spike, whatever the others did; but
    # where all is finite, and where it never is, it has no gradient.
    bad = np.isnan(found) & ~np.isfinite(record.norm[i])
    row = np.where(bad & ~np.isnan(tensors.norm).all(axis=0), math.inf, found)
    largest = [k for k in np.argsort(-row, kind="stable") if not np.isnan(row[k])][:3]
    return tuple((tensors.names[k], float(found[k])) for k in largest)


def warmup_of(record: Record, known: Any) -> int:
    """Return how long the first run's warm-up is; more runs are not cut."""
    return 0 if record.several else transient_length(record.norm[known])
