"""gradclip's own history: a header, then one line for each step."""

import json
import math
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gradclip.readers.assemble import in_order
from gradclip.readers.columns import WHOLE, number, parsed
from gradclip.record import LogError, Record, Steps, Tensors, kind_of, record_of
from gradclip.recorder import SCHEMA
from gradclip.wording import counted

CHUNK = 2_000
NAMES = ("step", "norm", "limit", "scale", "loss")


class Found:
    """What the lines of a file add up to."""

    def __init__(self) -> None:
        """Start with nothing."""
        self.columns = {name: array("d") for name in NAMES}
        self.heads: list[dict[str, Any]] = []
        self.starts: list[int] = []
        """How many steps came before each header."""
        self.names: tuple[str, ...] = ()
        self.tensors: dict[tuple[str, ...], list[tuple[int, int, list[float]]]] = {}
        """For each set of names how many steps came before, the step, and the norms."""
        self.damaged: list[int] = []

    def add_steps(self, entries: list[Any]) -> bool:
        """Take in lines that are all plain steps, quickly; return whether they are."""
        try:
            rows = [
                (e["step"], e["norm"], e["limit"], e["scale"], e.get("loss", math.nan))
                for e in entries
            ]
            numbers = np.array(rows, np.float64)
        except (KeyError, TypeError, ValueError, AttributeError):
            return False
        if not rows or not np.all(np.abs(numbers[:, 0]) < WHOLE):
            return False
        for name, values in zip(NAMES, numbers.T, strict=True):
            self.columns[name].frombytes(values.tobytes())
        return True

    def add(self, entry: Any) -> bool:
        """Take in one line; return whether it makes sense."""
        if not isinstance(entry, dict):
            return False
        if "gradclip" in entry:
            self.heads.append(entry)
            self.starts.append(len(self.columns["norm"]))
            return True
        if isinstance(names := entry.get("names"), list):
            self.names = tuple(map(str, names))
            return True
        step = number(entry.get("step", ""))
        if step is None or not abs(step) < WHOLE:
            return False
        return self._add_step(int(step), entry)

    def _add_step(self, step: int, entry: dict[str, Any]) -> bool:
        if isinstance(values := entry.get("tensors"), list):
            numbers = [number(x) for x in values]
            # The line with the names may be lost, or be that of another model.
            if len(values) != len(self.names) or None in numbers:
                return False
            row = [x for x in numbers if x is not None]
            before = len(self.columns["norm"])
            self.tensors.setdefault(self.names, []).append((before, step, row))
            return True
        norm = number(entry.get("norm", ""))
        if norm is None:
            return False
        rest = (number(entry.get(name)) for name in NAMES[2:])
        for name, x in zip(NAMES, (step, norm, *rest), strict=True):
            self.columns[name].append(np.nan if x is None else x)
        return True


def read(path: Path) -> Record:
    """Return the record of a file that gradclip wrote.

    Raises:
        LogError: If it has no steps, or its schema is of a later version.
    """
    found = Found()
    for start, lines in _chunks(path):
        _add_chunk(found, start, lines)
    check_version(found.heads, path)
    if not found.columns["norm"]:
        raise LogError(f"{path}: {_without_steps(found)}")
    written = _as_written(found)
    record, rows = in_order(written, _other_rules(found), found.starts)
    record = _with_rules(record, rows, found)
    tensors = _tensors(found, record, rows)
    return replace(record, tensors=tensors).also(*_damage(found))


def _without_steps(found: Found) -> str:
    """Return what a file without a step is."""
    if found.damaged and not found.heads:
        return (
            f"no history of gradclip's; line {found.damaged[0]} is none of its lines, "
            "nor is any other. Without format=… the kind is guessed."
        )
    return "a history without steps; the run ended before the first."


def _as_written(found: Found) -> Record:
    """Return the record in the order of the file, with the newest rule and facts."""
    columns = {name: np.frombuffer(x).copy() for name, x in found.columns.items()}
    record = record_of(
        columns["norm"],
        columns["step"].astype(np.int64),
        columns["limit"],
        columns["scale"],
        columns["loss"],
    )
    # Each start writes a header, and the last one is of the newest steps.
    head = found.heads[-1] if found.heads else {}
    return replace(
        record,
        rule=str(head.get("rule", "")),
        facts=dict(run) if isinstance(run := head.get("run"), dict) else {},
        format="gradclip",
    )


def _rules(found: Found) -> list[str]:
    return [str(head.get("rule", "")) for head in found.heads]


def _other_rules(found: Found) -> list[int]:
    """Return the rows that another rule begins with than the one before."""
    rules = _rules(found)
    changed = [a != b for a, b in pairwise(rules)]
    return [row for row, new in zip(found.starts[1:], changed, strict=False) if new]


def _with_rules(record: Record, rows: Steps, found: Found) -> Record:
    """Return the record with the rule of each run; runs end where norms change kind."""
    rules = _rules(found)
    if len(set(rules)) < 2:
        return record
    # Rows before the first header have lost their own: the last one is as good.
    head = np.searchsorted(found.starts, rows, side="right") - 1
    kinds = [kind_of(rule) for rule in rules]
    kind = np.array([kinds.index(x) for x in kinds])[head]
    ends = (np.diff(record.run) != 0) | (np.diff(kind) != 0)
    last = head[np.append(np.flatnonzero(ends), rows.size - 1)]
    run = np.concatenate([[0], np.cumsum(ends)])
    return replace(record, run=run, rules=tuple(rules[i] for i in last))


def _chunks(path: Path) -> Iterator[tuple[int, list[str]]]:
    # Damaged bytes cost their line only.
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = 1
        while lines := list(islice(file, CHUNK)):
            yield start, lines
            start += len(lines)


def _add_chunk(found: Found, start: int, lines: list[str]) -> None:
    try:
        # One call for all of them takes half the time of one for each.
        entries: list[Any] = json.loads(f"[{','.join(lines)}]")
    except ValueError:
        entries = [parsed(line) for line in lines]
    # A torn line can still be two values with a comma, once it stands in a list.
    if len(entries) != len(lines):
        entries = [parsed(line) for line in lines]
    others = entries if not found.add_steps(entries) else []
    for i, entry in enumerate(others):
        if not found.add(entry) and lines[i].strip():
            found.damaged.append(start + i)


def check_version(heads: list[dict[str, Any]], path: Path) -> None:
    """Refuse a history written by a later version of this library."""
    for head in heads:
        if head["gradclip"] != SCHEMA:
            raise LogError(
                f"{path}: a history of schema {head['gradclip']!r}, and this version "
                f"knows {SCHEMA}; upgrade gradclip."
            )


def _damage(found: Found) -> list[str]:
    lines = found.damaged
    if not lines:
        return []
    many = f"{counted(len(lines), 'lines were')} damaged and left out"
    return [f"{many}, the first is line {lines[0]}."]


def _tensors(found: Found, record: Record, rows: Steps) -> Tensors | None:
    """Return the norms of the parameters under the names that came last."""
    if not found.tensors:
        return None
    # Other names are those of another model, and cannot share a heat map.
    names, entries = list(found.tensors.items())[-1]
    owners = dict(zip(rows.tolist(), range(rows.size), strict=True))
    places: dict[int, list[int]] = {}
    for row, step in enumerate(found.columns["step"]):
        places.setdefault(int(step), []).append(row)
    newest = {}
    for before, after, step, nth, norms in _blocks(entries, len(found.columns["step"])):
        mine = places.get(step, [])
        # In one flush a step may stand twice: the nth norms belong to its nth row.
        next_row = mine[bisect_left(mine, before) :][nth : nth + 1]
        if next_row and next_row[0] < after and next_row[0] in owners:
            newest[owners[next_row[0]]] = norms
    own = np.array(sorted(newest), np.int64)
    norms_of = np.array([newest[i] for i in own.tolist()], np.float64)
    return Tensors(
        names, record.step[own], norms_of.reshape(-1, len(names)), record.run[own]
    )


def _blocks(
    entries: list[tuple[int, int, list[float]]], count: int
) -> Iterator[tuple[int, int, int, int, list[float]]]:
    """Yield norms with the rows that they may belong to, and their place among equals.

    A flush writes the norms of all its steps, and then the steps: of a branch that was
    replaced before, too.
    """
    ends = sorted({before for before, _, _ in entries} | {count})
    times: Counter[tuple[int, int]] = Counter()
    for before, step, norms in entries:
        after = ends[min(bisect_right(ends, before), len(ends) - 1)]
        yield before, after, step, times[before, step], norms
        times[before, step] += 1
