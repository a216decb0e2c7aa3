"""How far a study is: a bar in a terminal, a line for each cell anywhere else."""

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars


class Progress:
    """Shows how many cells of a study are done."""

    def __init__(self, name: str, console: Console) -> None:
        """Start with a bar, if the console is a terminal."""
        self.name, self.console = name, console
        columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(
            "{task.description}",
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_interactive,
        )
        self._task: TaskID | None = None
        self._cells, self._done = 0, 0

    def __enter__(self) -> "Progress":
        """Show the bar."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        self._bars.stop()

    def start(self, cells: int, already: int, seconds: float) -> None:
        """Begin with some cells that are done, and say how long the others take."""
        self._cells, self._done = cells, already
        self._task = self._bars.add_task(self.name, total=cells, completed=already)
        if already:
            self._line(f"{already} of {cells} are there already")
        if already < cells:
            line = f"{self.name}  about {duration(seconds)} on one core"
            self.console.print(line, markup=False, highlight=False)

    def within(self, share: float) -> None:
        """Note the share of the present cell that is done."""
        if self._task is not None:
            self._bars.update(self._task, completed=self._done + share)

    def done(self, cell: dict[str, Any]) -> None:
        """Note the end of a cell."""
        self._done += 1
        self.within(0)
        settings = ", ".join(f"{name} {x}" for name, x in cell.items())
        self._line(f"{self._done} of {self._cells}: {settings}")

    def _line(self, what: str) -> None:
        if not self.console.is_interactive:
            line = f"{self.name}  {what}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Return a time as people say it: an estimate has no more digits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
