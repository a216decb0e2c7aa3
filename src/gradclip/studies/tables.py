"""Tables of estimates as plain data, and the text of one cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradclip.studies.results import Results
from gradclip.studies.statistics import Estimate, mean, share, within_noise

NOISE = "≈"
"""Marks what is within noise of the reference."""


@dataclass(frozen=True)
class Table:
    """Estimates in rows and columns, or texts."""

    title: str
    columns: list[str]
    """The heading of each column, the first one over the names of the rows."""
    rows: list[list[Any]]
    """A name, then texts or estimates."""
    form: str = ".3g"
    """How numbers are written."""
    reference: str | None = None
    """The row that the others are compared with, seed by seed."""


def pivot(
    results: Results,
    title: str,
    measure: str,
    rows: str,
    columns: str,
    *,
    reference: str | None = None,
    form: str = ".3g",
    estimate: Callable[[Sequence[Any]], Estimate] = mean,
    **where: Any,
) -> Table:
    """Return a measurement with one setting down and one across.

    Args:
        results: The rows of a study.
        title: What the numbers are.
        measure: Which measurement.
        rows: The setting down.
        columns: The setting across.
        reference: The value of the setting down that the others are compared with.
        form: How numbers are written.
        estimate: `mean` or `share`.
        where: The other settings.
    """
    across = results.options(columns, **where)

    def entry(row: Any, column: Any) -> Any:
        here = where | {rows: row, columns: column}
        if not results.found(**here):
            return "not run"
        values = results.values(measure, **here)
        found: dict[str, Any] = {**estimate(values)}
        against = where | {rows: reference, columns: column}
        if reference is not None and row != reference and results.found(**against):
            found["noise"] = within_noise(values, results.values(measure, **against))
        return found

    return Table(
        title,
        [rows, *(f"{columns} {x}" for x in across)],
        [
            [str(row), *(entry(row, column) for column in across)]
            for row in results.options(rows, **where)
        ],
        form,
        reference,
    )


def rates(results: Results, title: str, measure: str, **settings: Any) -> Table:
    """Return a table of shares, in per cent."""
    return pivot(results, title, measure, form=".0%", estimate=share, **settings)


def text(entry: Any, form: str) -> str:
    """Return what a cell of a table says."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        return format(entry, "," if isinstance(entry, int) else form)
    if entry["value"] is None:
        return f"{entry['not_finite']} of {entry['seeds']} not finite"
    mark = f" {NOISE}" if entry.get("noise") else ""
    said = format(entry["value"], form)
    if entry["low"] is None:
        return said + mark
    return f"{said} [{entry['low']:{form}}, {entry['high']:{form}}]{mark}"
