"""TensorBoard event folders, through the tensorboard package."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradclip.readers.columns import Columns
from gradclip.readers.tabular import needs
from gradclip.record import LogError

PATTERN = "*tfevents*"
MOST = 1000
"""Steps that are gathered before the oldest is kept, to spare memory."""
FRAME = 16
"""Bytes around each record: its length, and two checksums."""


class Gathered:
    """The rows of the steps that came last, before they are kept in columns."""

    def __init__(self, columns: Columns, most: float) -> None:
        """Start without a row."""
        self.columns, self.most = columns, most
        self.rows: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self.places: dict[int, int] = {}
        self.last: dict[str, int] = {}
        """In which row of the columns each name came last."""

    def put(self, step: int, name: str, number: float) -> None:
        """Take in a scalar; a step that comes again begins a new row."""
        # A resumed run repeats its steps, and which of them count is decided later.
        # Where some tags count samples, as Megatron-LM's do, a step may be there long
        # before its turn: no column may go backwards in the rows.
        if step in self.rows and self.places[step] <= self.last.get(name, -1):
            self.keep(0)
        if step not in self.rows:
            self.keep(self.most - 1)
            self.places[step] = self.columns.count + len(self.rows)
            self.rows[step] = {"step": step}
        self.last[name] = self.places[step]
        self.rows[step][name] = number

    def keep(self, rest: float) -> None:
        """Hand the oldest rows over, until so many are left."""
        while len(self.rows) > rest:
            step, row = self.rows.popitem(last=False)
            del self.places[step]
            self.columns.add(row)


def read(path: Path, column: str | None) -> Columns:
    """Return the scalars of an event file, or of all those in a folder, as columns.

    Raises:
        LogError: If nothing in a file can be read.
        ModuleNotFoundError: If tensorboard is not installed.
    """
    columns, files = Columns(column), event_files(path)
    if not files:
        raise LogError(f"{path}: no event file of TensorBoard's is in this folder.")
    # The loss of a step may be in another file than its norm.
    gathered = Gathered(columns, MOST if len(files) == 1 else math.inf)
    for file in files:
        if path.is_dir() and not file.stat().st_size:
            columns.notes.append(f"{file.name} is empty.")
            continue
        folder = file.parent.name if _is_of_one_name(file, path, columns) else ""
        for event in _events(file, columns):
            _take(event, gathered, folder)
    gathered.keep(0)
    if not columns.count:
        raise LogError(f"{path}: the event files hold no scalars.")
    return columns


def _events(file: Path, columns: Columns) -> Iterator[Any]:
    """Yield the events of a file; tensorboard itself is silent about damage."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import (
            RawEventFileLoader,
        )
        from tensorboard.compat.proto.event_pb2 import Event
    except ModuleNotFoundError as missing:
        raise needs("tensorboard", file, missing) from None
    read, size = 0, file.stat().st_size
    for record in RawEventFileLoader(str(file)).Load():
        yield Event.FromString(record)
        read += len(record) + FRAME
    if read == 0:
        raise LogError(f"{file}: no whole event in it.")
    if read < size:
        columns.notes.append(
            f"{file.name} is damaged or cut off at byte {read} of {size}; what lies "
            "behind was not read."
        )


def event_files(path: Path) -> list[Path]:
    """Return the event files at a path, in the order they were begun."""
    if path.is_file():
        return [path]
    files = sorted(path.rglob(PATTERN), key=lambda file: file.name)
    # Their names begin with the time; those of a folder belong together.
    begun = {file.parent: i for i, file in reversed(list(enumerate(files)))}
    return sorted(files, key=lambda file: begun[file.parent])


def _take(event: Any, gathered: Gathered, folder: str) -> None:
    """Gather the scalars of a step."""
    for value in event.summary.value:
        number = _scalar(value)
        if number is not None:
            gathered.put(event.step, _named(value.tag, folder), number)


def _is_of_one_name(file: Path, path: Path, columns: Columns) -> bool:
    """Return whether a file may be one of those that `add_scalars` writes."""
    if file.parent in (path, path.parent):
        return False
    tags: set[str] = set()
    for event in _events(file, columns):
        tags.update(value.tag for value in event.summary.value)
        if len(tags) > 1:
            return False
    return True


def _named(tag: str, folder: str) -> str:
    """Return the column of a tag; `add_scalars` has a folder for each of its names."""
    prefix = f"{tag.replace('/', '_')}_"
    return f"{folder.removeprefix(prefix)}/{tag}" if folder.startswith(prefix) else tag


def _scalar(value: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    tensor = value.tensor
    if value.metadata.plugin_data.plugin_name not in ("scalars", ""):
        return None
    if tensor.float_val:
        return float(tensor.float_val[0])
    if len(tensor.tensor_content) == 4:
        return float(np.frombuffer(tensor.tensor_content, "<f4")[0])
    return None
