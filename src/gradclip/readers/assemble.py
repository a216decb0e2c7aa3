"""From columns to a record: align, put steps in order, tell runs apart."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradclip.readers.choice import (
    choose_limit,
    choose_loss,
    choose_norm,
    choose_step,
    known_limit,
)
from gradclip.readers.columns import WHOLE, Column, Columns
from gradclip.readers.runs import split_runs
from gradclip.record import Floats, Record, Steps, record_of
from gradclip.wording import counted


def assemble(columns: Columns, source: str, format: str) -> Record:
    """Return the record that columns make up.

    Args:
        columns: What a reader found.
        source: The file, for messages.
        format: What the file is.

    Returns:
        The record, with what was odd in its notes.

    Raises:
        LogError: If no column is the norm before clipping.
    """
    name, networks = choose_norm(columns, source)
    norm = columns.found[name]
    values, rows = as_floats(norm), np.frombuffer(norm.rows, np.int64)
    step, notes = _steps(columns, name)
    limit = _limits(columns, choose_limit(columns, name), rows)
    loss = _other(columns, choose_loss(columns, name), rows)
    record = record_of(values, step, limit, loss=loss)
    # Without a limit beside it, a scale may be that of the loss.
    if (scale := columns.found.get("scale")) and "limit" in columns.found:
        record = replace(record, scale=_aligned(scale, rows))
    record = replace(record, format=format, column=name, networks=networks)
    if networks:
        notes.append(
            f"read {name}; {', '.join(networks)} "
            f"belong{'' if networks[1:] else 's'} to other networks: "
            "name them with column=… (--column)."
        )
    if norm.bad:
        notes.append(
            f"{norm.bad} cells of {name} hold no number and were left out, the first "
            f"is {norm.first_bad[:40]!r}."
        )
    record, _ = in_order(record)
    return record.also(*columns.notes, *notes)


def in_order(
    record: Record, starts: Sequence[int] = (), heads: Sequence[int] = ()
) -> tuple[Record, Steps]:
    """Return the record with its runs told apart and replaced branches left out.

    Args:
        record: Its rows in the order of the file.
        starts: Rows that repeat none before, whatever their numbers.
        heads: Rows that a process began with, where the file tells.

    Returns:
        The record, and the row of the file that each of its own was.
    """
    runs, notes = split_runs(record.step, record.norm, starts, heads)
    rows = np.array([row for run in runs for row in run], np.int64)
    names = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
    return replace(record.take(rows), run=names).also(*notes), rows


def as_floats(column: Column) -> Floats:
    """Return the numbers of a column."""
    return np.frombuffer(column.values, np.float64).copy()


def _aligned(column: Column, rows: Steps) -> Floats:
    """Return the numbers of a column in given rows; NaN where there is none."""
    own = np.frombuffer(column.rows, np.int64)
    if not own.size:
        return np.full(rows.shape, np.nan)
    places = np.searchsorted(own, rows)
    places = np.minimum(places, own.size - 1)
    return np.where(own[places] == rows, as_floats(column)[places], np.nan)


def _other(columns: Columns, name: str | None, rows: Steps) -> Floats:
    if name is None:
        return np.full(rows.shape, np.nan)
    return _aligned(columns.found[name], rows)


def _limits(columns: Columns, name: str | None, rows: Steps) -> Floats:
    """Return the limit in force, from a column or from what the log mentions."""
    if name is None or not len(columns.found[name].values):
        return np.full(rows.shape, known_limit(columns.limit))
    limit = _aligned(columns.found[name], rows)
    if np.isnan(limit).all():
        # An argument that was printed once, in a row of its own.
        limit = np.full(rows.shape, as_floats(columns.found[name])[-1])
    if name == "limit":
        return limit
    # An argument that is not in every row has not changed in the others.
    known = ~np.isnan(limit)
    last = np.maximum.accumulate(np.where(known, np.arange(limit.size), known.argmax()))
    return np.where(limit[last] > 0, limit[last], np.inf)


def _steps(columns: Columns, norm: str) -> tuple[Steps, list[str]]:
    rows = np.frombuffer(columns.found[norm].rows, np.int64)
    count = np.arange(rows.size)
    name = choose_step(columns, norm)
    if name is None:
        return count, ["the log has no steps; they were counted from 0."]
    column = columns.found[name]
    step = _aligned(column, rows)
    # Hugging Face prints 0.01, 0.02, …, of which several steps share one.
    if name.lower() == "epoch" and not _whole_and_rising(step):
        return count, ["the log has epochs but no steps; steps were counted from 0."]
    step, notes = _filled(step)
    if column.rounded:
        even, more = _unrounded(step)
        return even, [*notes, *more]
    if np.any(step != np.floor(step)):
        note = f"steps such as {step[step != np.floor(step)][0]:g} are no whole numbers"
        return count, [f"{note}; they were counted from 0."]
    if (epochs := columns.found.get("epoch")) and name.lower() != "epoch":
        step = _through_epochs(step, _aligned(epochs, rows))
    return step.astype(np.int64), notes


def _through_epochs(step: Floats, epoch: Floats) -> Floats:
    """Return steps that are counted on where each epoch begins with them afresh."""
    again, on = np.diff(step) <= 0, np.diff(epoch) > 0
    # Steps that begin again without a new epoch are those of another run.
    if not again.any() or np.any(again != on):
        return step
    gap = np.median(np.diff(step)[~again]) if not again.all() else 1
    before = np.concatenate([[0], np.where(again, step[:-1] - step[1:] + gap, 0)])
    return step + np.cumsum(before)


def _whole_and_rising(step: Floats) -> bool:
    return bool(np.all(step == np.round(step)) and np.all(np.diff(step) > 0))


def _filled(step: Floats) -> tuple[Floats, list[str]]:
    """Return steps with the missing ones counted on from those before, and a note."""
    known = np.abs(step) < WHOLE
    if known.all():
        return step, []
    places = np.maximum.accumulate(np.where(known, np.arange(step.size), 0))
    base = np.where(known[places], step[places], 0)
    missing = counted(int(np.sum(~known)), "rows have no step and were")
    note = f"{missing} counted on from the row before."
    return base + (np.arange(step.size) - places), [note]


def _unrounded(step: Floats) -> tuple[Steps, list[str]]:
    """Return steps whose last digits were lost in printing, counted on evenly."""
    # Three digits, as %.3g prints them, are exact below 1000.
    gaps = np.diff(step[step < 1000])
    gap = float(np.median(gaps)) if gaps.size else 1.0
    even = step[0] + gap * np.arange(step.size)
    # Three digits are off by half a per cent at most.
    if np.all(np.abs(even - step) <= 0.006 * np.abs(step) + gap):
        step = even
        note = f"steps were printed rounded; they were counted on by {gap:g}."
    else:
        note = "steps were printed rounded; several rows share one."
    return step.astype(np.int64), [note]
