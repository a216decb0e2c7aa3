"""MLflow's file store: a file for each metric, with a line for each value."""

from collections import Counter
from pathlib import Path
from typing import Any

from gradclip.readers.columns import Columns, number
from gradclip.record import LogError


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
        LogError: If there is no run, or a line is damaged.
    """
    runs = runs_in(path)
    if not runs:
        raise LogError(f"{path}: a folder without a log that gradclip knows.")
    columns = Columns(column)
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for file in sorted(file for file in runs[-1].rglob("*") if file.is_file()):
        name = file.relative_to(runs[-1]).as_posix()
        # A run that was started again logs its steps a second time.
        times: Counter[int] = Counter()
        text = file.read_text("utf-8", errors="replace")
        for at, line in enumerate(text.splitlines(), 1):
            step, value = _values(line, file, at)
            place = times[step], step
            rows.setdefault(place, {"step": step})[name] = value
            times[step] += 1
    # Where no step was given, MLflow writes 0.
    counted = any(step for _, step in rows)
    for place in sorted(rows):
        if not counted:
            del rows[place]["step"]
        columns.add(rows[place])
    if len(runs) > 1:
        columns.notes.append(
            f"{len(runs)} runs are in this store; read the newest, "
            f"{runs[-1].parent.name}. Name the folder of another to read that."
        )
    return columns


def _values(line: str, file: Path, at: int) -> tuple[int, float]:
    parts = line.split(" ")
    value = number(parts[1]) if len(parts) > 1 else None
    # The first lines of old stores have no step; a later one was cut off.
    step = number(parts[2]) if len(parts) > 2 else 0.0 if at == 1 else None
    if value is None or step is None or step != step:
        raise LogError(f"{file}, line {at}: not 'time value step': {line[:60]!r}.")
    return int(step), value
