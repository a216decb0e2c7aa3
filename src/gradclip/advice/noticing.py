"""What is odd about a log, in sentences: gaps, norms that say nothing, phases."""

from collections.abc import Iterator

import numpy as np

from gradclip.advice.evidence import ends
from gradclip.advice.facts import Facts
from gradclip.advice.spikes import alive
from gradclip.record import NOT_TAKEN
from gradclip.rules import usable
from gradclip.wording import ordinal


def noticed(facts: Facts) -> list[str]:
    """Return what a reader of the advice should know about the log."""
    return [*_gaps(facts), *_oddities(facts), *_phases(facts)]


def _gaps(facts: Facts) -> Iterator[str]:
    gaps = np.diff(facts.record.step)
    gaps = gaps[gaps > 0]
    # The median: a hole in the log is not its rhythm.
    gap = int(np.median(gaps)) if gaps.size else 1
    if gap > 1:
        yield (
            f"the log has every {ordinal(gap)} step: spikes between them are not "
            "in it, and some loggers write the mean since the last line."
        )


def _oddities(facts: Facts) -> Iterator[str]:
    norm = facts.record.norm
    if zeros := int((alive(facts.record) & (norm == 0)).sum()):
        yield (
            f"{zeros} of {norm.size} norms are exactly 0: steps without a signal, "
            "which are left out of the quantiles."
        )
    if left := int((norm == NOT_TAKEN).sum()):
        yield (
            f"{left} of {norm.size} norms are {NOT_TAKEN}, as loggers write where none "
            "was taken, and are left out."
        )
    if bad := int((~np.isfinite(norm)).sum()):
        yield f"{bad} of {norm.size} norms are NaN or infinite."
    # Of a run that was lost, the reasons say more.
    if facts.still and facts.healthy is None:
        before, after = ends(facts.record.loss)
        yield (
            "the loss ended no lower than it began, or less than 2 % (the median "
            f"of its first tenth is {before:.4g}, of its last {after:.4g}): the "
            "norms of a run that does not learn say little about one that does."
        )


def _phases(facts: Facts) -> Iterator[str]:
    if facts.warmup:
        first = np.median(facts.norm[: facts.warmup])
        yield (
            f"the first {facts.warmup} norms (median {first:.3g}) are a phase of "
            f"their own and are set apart from the rest "
            f"(median {np.median(facts.steady):.3g})."
        )
    if facts.change:
        steps = facts.record.step[usable(facts.record.norm)]
        before, after = facts.steady[: facts.change], facts.steady[facts.change :]
        yield (
            f"the level of the norms changes at step "
            f"{steps[facts.warmup + facts.change]} (median {np.median(before):.3g} "
            f"before, {np.median(after):.3g} after): one limit for both may fit "
            "neither."
        )
