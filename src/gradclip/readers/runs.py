"""Steps as they stand in a file: resumed, started afresh, or of jobs that took turns.

A file is followed row by row. Each row belongs to the thread whose next step it is;
where there is none, a new thread starts. Threads that lie behind one another are a
resumed run (the newest branch counts) or a fresh start, threads that take turns are
jobs that wrote into one file.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gradclip.record import Floats, Steps
from gradclip.wording import counted

ALIVE = 20
"""After how many rows of others a thread counts as ended."""
AFRESH = 20
"""Of a run that is resumed, more than one part in so many is kept."""
MOST = 20
"""More threads than this that take turns are no jobs, but rows without an order."""


@dataclass
class Thread:
    """Rows that belong together."""

    rows: list[int]
    last: int
    gap: int


def split_runs(
    step: Steps,
    norm: Floats,
    starts: Sequence[int] = (),
    heads: Sequence[int] = (),
) -> tuple[list[list[int]], list[str]]:
    """Return the rows of each run, and what had to be decided.

    Args:
        step: The steps in the order of the file.
        norm: The norms beside them; a row that repeats both is left out.
        starts: Rows that repeat none before, as the first under another rule.
        heads: Rows that a process began with, where the file tells.

    Returns:
        For each run its rows, and sentences about resumes, restarts and repetitions.
    """
    # Most logs are in order, and need nothing of what follows.
    if step.size == 0 or bool(np.all(np.diff(step) > 0)):
        return [list(range(step.size))], []
    if step.size > 2 and bool(np.all(np.diff(step) < 0)):
        notes = ["the newest step stands first; the steps were turned round."]
        return [list(range(step.size))[::-1]], notes
    rows, notes = _without_repeats(step, norm, starts)
    # Where the row itself repeats another, the process begins with the next one.
    places = np.searchsorted(rows, [row for row in heads if row <= rows[-1]])
    begun = {rows[i] for i in places}
    threads = _threads(step, rows, begun)
    once = np.unique(step).size == len(rows)
    if once and len(threads) > MOST and _take_turns(threads):
        note = "the rows are in no order; they were put in that of their steps."
        return [sorted(rows, key=step.__getitem__)], [*notes, note]
    return _joined(threads, step, notes, begun)


def _without_repeats(
    step: Steps, norm: Floats, starts: Sequence[int]
) -> tuple[list[int], list[str]]:
    # With several processes, each may print the line of a step.
    same = (step[1:] == step[:-1]) & (
        (norm[1:] == norm[:-1]) | np.isnan(norm[1:]) | np.isnan(norm[:-1])
    )
    same[[row - 1 for row in starts if 0 < row < step.size]] = False
    repeated = np.concatenate([[False], same])
    # Of a norm and the null that repeats its step, the norm says more.
    swap = np.flatnonzero(same & np.isnan(norm[:-1]) & ~np.isnan(norm[1:]))
    repeated[swap + 1], repeated[swap] = False, True
    count = int(repeated.sum())
    note = f"{counted(count, 'rows repeat the step before and were')} left out."
    notes = [note] if count else []
    return np.flatnonzero(~repeated).tolist(), notes


def _threads(step: Steps, rows: list[int], begun: Set[int]) -> list[Thread]:
    # Sorted, since jobs that take turns jump back and forth from row to row.
    gaps = np.diff(np.unique(step[rows]))
    usual = int(np.median(gaps)) if gaps.size else 1
    threads: list[Thread] = []
    recent: list[Thread] = []
    for row, behind in zip(rows, [*rows[1:], None], strict=True):
        at = int(step[row])
        again = behind is not None and step[behind] == at
        if row in begun:
            # A new process goes on where the last one was, or from a step before it,
            # and never where one was that had been replaced.
            thread = recent[0] if recent and at > recent[0].last else None
        else:
            thread = _continued(recent, at, row, again)
        if thread is None:
            thread = Thread([row], at, usual)
            threads.append(thread)
        else:
            # A hole in the log must not become the gap that is expected next.
            thread.gap = min(at - thread.last, 10 * usual)
            thread.rows.append(row)
            thread.last = at
        if not recent or recent[0] is not thread:
            # Hardly more take turns, and a search through all would take long.
            recent = [thread, *(t for t in recent if t is not thread)][:4]
    return threads


def _continued(recent: list[Thread], at: int, row: int, again: bool) -> Thread | None:
    """Return the thread that a step goes on with, if any.

    `again` is whether the row behind has the same step.
    """
    alive = [t for t in recent if row - t.rows[-1] <= ALIVE]
    if fitting := [t for t in alive if at - t.last == t.gap]:
        # Of two jobs that write in turn, the one that wrote last comes second.
        return fitting[-1 if again else 0]
    # After a hole no thread fits, and the one that wrote last goes on.
    if recent and at > recent[0].last:
        return recent[0]
    # A branch that was left does not go on, other than a job that was overtaken.
    begun = max((t.rows[0] for t in recent), default=0)
    later = [t for t in alive if at > t.last and t.rows[-1] > begun]
    return min(later, key=lambda t: at - t.last, default=None)


def _take_turns(threads: Sequence[Thread]) -> bool:
    """Return whether a thread goes on behind the first row of the next one."""
    # A resumed run begins behind the last row of the one before.
    return any(a.rows[-1] > b.rows[0] for a, b in pairwise(threads))


def _joined(
    threads: list[Thread], step: Steps, notes: list[str], begun: Set[int]
) -> tuple[list[list[int]], list[str]]:
    """Put threads together that follow each other; the newest branch replaces."""
    runs: list[list[int]] = []
    dropped = resumed = unsaid = 0
    jobs = _take_turns(threads)
    for thread in threads:
        first = int(step[thread.rows[0]])
        kept = [row for row in runs[-1] if step[row] < first] if runs else []
        # What leaves hardly a row of a run does not resume it: it is another one.
        if jobs or not runs or len(kept) <= len(runs[-1]) / AFRESH:
            runs.append(thread.rows)
            continue
        dropped += len(runs[-1]) - len(kept)
        resumed += 1
        unsaid += thread.rows[0] not in begun
        runs[-1] = kept + thread.rows
    if resumed:
        # Long batches of two look alike, but that nobody began between them.
        other = ", or two processes wrote into this file" if unsaid > 1 else ""
        notes = [
            *notes,
            f"resumed {counted(resumed, 'times')} from an earlier step{other}: the "
            "newest branch counts, and the "
            f"{counted(dropped, 'steps that it replaces were')} left out.",
        ]
    if len(runs) > 1:
        how = "jobs that took turns" if jobs else "runs, one after the other,"
        notes = [*notes, f"{len(runs)} {how} are in this log."]
    return runs, notes
