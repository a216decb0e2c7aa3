"""MLflow's stores: a folder with a file for each metric, or a database of SQLite."""

import math
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from gradclip.readers.columns import Columns, number
from gradclip.record import LogError

DATABASE = "mlflow.db"
"""What MLflow calls its database, unless it is told otherwise."""
SQLITE = b"SQLite format 3\0"
"""What a database begins with."""
LARGEST = sys.float_info.max
NEEDED = {"key", "value", "timestamp", "step", "run_uuid", "is_nan"}
"""The columns of the table `metrics` that are read."""


def runs_in(path: Path) -> list[Path]:
    """Return the folders `metrics` at or below a path, that written last at the end."""
    if path.name == "metrics" and path.is_dir():
        return [path]
    found = [folder for folder in path.rglob("metrics") if folder.is_dir()]
    marked = [folder for folder in found if _is_marked(folder)]
    return sorted(marked or found, key=_written)


def holds_runs(path: Path) -> bool:
    """Return whether MLflow's own mark is on a run at or below a path."""
    return any(map(_is_marked, runs_in(path)))


def _is_marked(folder: Path) -> bool:
    # A folder of any project may be called metrics.
    return (folder.parent / "meta.yaml").is_file()


def _written(folder: Path) -> int:
    """Return when a run was written last, which the time of its folder does not say."""
    times = [x.stat().st_mtime_ns for x in folder.rglob("*") if x.is_file()]
    return max(times, default=0)


def read(path: Path, column: str | None) -> Columns:
    """Return the metrics of the newest run as columns.

    Raises:
        LogError: If there is no run, or a line or a database is damaged.
    """
    columns = Columns(column)
    if path.is_file():
        _take(_database_values(path, columns), columns)
        return columns
    runs = runs_in(path)
    if not runs:
        raise LogError(f"{path}: a folder without a log that gradclip knows.")
    _take(_folder_values(runs[-1]), columns)
    if len(runs) > 1:
        columns.notes.append(
            f"{len(runs)} runs are in this store; read the newest, "
            f"{runs[-1].parent.name}. Name the folder of another to read that."
        )
    return columns


def _take(values: Iterable[tuple[str, int, float]], columns: Columns) -> None:
    """Put the values of a run, in the order they were logged, into rows."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for name, step, value in values:
        # A run that was started again logs its steps a second time.
        place = times[name, step], step
        rows.setdefault(place, {"step": step})[name] = value
        times[name, step] += 1
    # Where no step was given, MLflow writes 0.
    counted = any(step for _, step in rows)
    for place in sorted(rows):
        if not counted:
            del rows[place]["step"]
        columns.add(rows[place])


def _folder_values(run: Path) -> Iterator[tuple[str, int, float]]:
    """Yield name, step and value of all that is in the files of a run."""
    for file in sorted(file for file in run.rglob("*") if file.is_file()):
        name = file.relative_to(run).as_posix()
        text = file.read_text("utf-8", errors="replace")
        for at, line in enumerate(text.splitlines(), 1):
            yield name, *_values(line, file, at)


def _values(line: str, file: Path, at: int) -> tuple[int, float]:
    parts = line.split(" ")
    value = number(parts[1]) if len(parts) > 1 else None
    # The first lines of old stores have no step; a later one was cut off.
    step = number(parts[2]) if len(parts) > 2 else 0.0 if at == 1 else None
    if value is None or step is None or step != step:
        raise LogError(f"{file}, line {at}: not 'time value step': {line[:60]!r}.")
    return int(step), value


def _database_values(path: Path, columns: Columns) -> Iterator[tuple[str, int, float]]:
    """Yield name, step and value of the newest run in a database."""
    try:
        # A training may be writing to it, and nothing here may get in its way.
        address = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True)) as database:
            _check_is_mlflows(database, path)
            for name, step, value, is_nan in database.execute(
                "select key, step, value, is_nan from metrics where run_uuid = ? "
                "order by timestamp, rowid",
                [_newest_run(database, path, columns)],
            ):
                yield name, step, math.nan if is_nan else _unbounded(value)
    except sqlite3.Error as error:
        raise LogError(
            f"{path}: a database that SQLite cannot read: {error}."
        ) from None


def _check_is_mlflows(database: sqlite3.Connection, path: Path) -> None:
    columns = database.execute("select name from pragma_table_info('metrics')")
    if not {name for (name,) in columns} >= NEEDED:
        raise LogError(
            f"{path}: a database of SQLite that is not MLflow's: it has no table of "
            "metrics as MLflow makes it. Export the norms to a CSV file."
        )


def _newest_run(database: sqlite3.Connection, path: Path, columns: Columns) -> str:
    """Return the run that was written last, and note where there are others."""
    # Deleted runs stay in the database until MLflow collects its garbage.
    runs = database.execute(
        "select m.run_uuid, r.name, max(m.timestamp) as written from metrics m "
        "left join runs r on r.run_uuid = m.run_uuid "
        "where coalesce(r.lifecycle_stage, 'active') != 'deleted' "
        "group by m.run_uuid order by written desc, max(m.rowid) desc"
    ).fetchall()
    if not runs:
        raise LogError(f"{path}: a database of MLflow's without a metric of any run.")
    run, name, _ = runs[0]
    if len(runs) > 1:
        columns.notes.append(
            f"{len(runs)} runs are in this database; read the newest, "
            f"{name or 'without a name'} ({run}). Export another to a CSV file to "
            "read that."
        )
    return str(run)


def _unbounded(value: float) -> float:
    """Return infinity for the largest number, which MLflow keeps in its place."""
    return math.copysign(math.inf, value) if abs(value) == LARGEST else value
