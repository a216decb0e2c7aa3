"""The measurements of a study: by cell, which is its settings, and by seed."""

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

Cell: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, Any]


class Results:
    """The measurements of a study, by cell and seed."""

    def __init__(self, cells: Sequence[Cell], seeds: Sequence[int]) -> None:
        """Start without measurements."""
        self.cells, self.seeds = list(cells), list(seeds)
        self._rows: dict[tuple[str, int], Row] = {}

    def add(self, cell: Cell, seed: int, row: Row) -> None:
        """Take in the measurements of a seed."""
        self._rows[key(cell), seed] = row

    def missing(self, cell: Cell) -> list[int]:
        """Return the seeds of a cell that are still to be run."""
        return [seed for seed in self.seeds if (key(cell), seed) not in self._rows]

    def found(self, **where: Any) -> list[Cell]:
        """Return the cells with these settings."""
        return [
            cell
            for cell in self.cells
            if all(cell.get(name) == x for name, x in where.items())
        ]

    def part(self, **where: Any) -> "Results":
        """Return the measurements of the cells with these settings."""
        part = Results(self.found(**where), self.seeds)
        part._rows = self._rows
        return part

    def options(self, setting: str, **where: Any) -> list[Any]:
        """Return the values of a setting among the cells, in their order."""
        return list(dict.fromkeys(cell[setting] for cell in self.found(**where)))

    def values(self, measure: str, **where: Any) -> list[Any]:
        """Return a measurement of the only cell with these settings, for each seed."""
        (cell,) = self.found(**where)
        rows = (self._rows.get((key(cell), seed)) for seed in self.seeds)
        return [number(row[measure]) for row in rows if row is not None]

    @property
    def complete(self) -> bool:
        """Whether every cell has all its seeds."""
        return not any(map(self.missing, self.cells))


def key(cell: Cell) -> str:
    """Return the settings of a cell as one text."""
    return json.dumps(cell, sort_keys=True)


def number(x: Any) -> Any:
    """Return what JSON held: infinity and NaN stand there by their names."""
    return float(x) if x in ("Infinity", "-Infinity", "NaN") else x
