"""Tables: CSV with any delimiter, and Parquet."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path

from gradclip.readers.choice import NORM, STEPS
from gradclip.readers.columns import Columns, number
from gradclip.record import LogError

DELIMITERS = ",\t;"
SOME = 1000
"""Lines in which the sign between cells is looked for."""


def delimiter_of(head: str) -> str | None:
    """Return what separates the cells of a table; None if the text is no table."""
    lines = [line for line in head.splitlines() if line.strip()][:2]
    if len(lines) < 2:
        return None
    for sign in DELIMITERS:
        names = next(csv.reader([lines[0]], delimiter=sign))
        cells = next(csv.reader([lines[1]], delimiter=sign))
        named = all(_is_name(name) for name in names)
        numbers = sum(number(cell) is not None or not cell.strip() for cell in cells)
        # Half of the cells are numbers, or it is prose with commas.
        if len(names) > 1 and len(names) == len(cells) <= 2 * numbers and named:
            return sign
    return None


def _is_name(text: str) -> bool:
    """Return whether a cell may head a column: a word, not a piece of a dictionary."""
    worded = any(c.isalpha() for c in text) or not text.strip()
    return worded and not any(c in text for c in "{}\x1b")


def is_heading(text: str) -> bool:
    """Return whether a text is a line with the names of columns, and no more."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = (next(csv.reader(lines, delimiter=sign)) for sign in DELIMITERS)
    return len(lines) == 1 and any(len(row) > 1 and _has_known(row) for row in rows)


def _has_known(row: Iterable[str]) -> bool:
    """Return whether one of these names is that of a step or of a norm."""
    names = (name.strip().lower() for name in row)
    return any(name in STEPS or NORM.fullmatch(name) for name in names)


def _begins_with_name(row: Sequence[str]) -> bool:
    """Return whether a row may name columns: a quick look, as each row is looked at."""
    return bool(row) and row[0][:1].replace("_", "a").isalpha()


def _names_columns(row: Sequence[str]) -> bool:
    """Return whether a row below the heading is another heading."""
    return all(number(x) is None and _is_name(x) for x in row) and _has_known(row)


def is_one_column(text: str) -> bool:
    """Return whether a text is the name of a norm, and numbers below it."""
    name, *cells = [
        line.strip().strip('"') for line in text.splitlines() if line.strip()
    ]
    known = NORM.fullmatch(name) is not None
    return known and bool(cells) and all(number(x) is not None for x in cells[:2])


def read_csv(lines: Iterable[str], source: str, column: str | None) -> Columns:
    """Return the columns of a table; rows of another width are left out and counted.

    A row that is a heading itself names the columns from there on.

    Raises:
        LogError: If it has no row below the names, or a cell beyond any measure.
    """
    lines = iter(lines)
    # Those above the heading are empty, and count where a line is named.
    above, first = next(((i, x) for i, x in enumerate(lines, 1) if x.strip()), (0, ""))
    some = list(islice(lines, SOME))
    sign = delimiter_of("".join([first, *some])) or max(DELIMITERS, key=first.count)
    names = _apart(map(str.strip, next(csv.reader([first], delimiter=sign), [])))
    if names and all(number(x) is not None for x in names):
        raise LogError(
            f"{source}: a table without a heading, its first line is "
            f"{first.strip()!r}. Put a line of names above, as step,grad_norm."
        )
    columns, bad = Columns(column), []
    for at, cells in _rows(chain(some, lines), sign, source, above):
        odd = len(cells) != len(names)
        # A resumed run writes its names again, and may log more than before, or less.
        if (odd or _begins_with_name(cells)) and _names_columns(cells):
            names = _apart(map(str.strip, cells))
        elif not odd:
            columns.add(dict(zip(names, cells, strict=True)))
        elif cells:
            bad.append(at)
    if not (columns.count or bad):
        heading = ", ".join(names)[:200] or "empty"
        raise LogError(f"{source}: a table without a row; its heading is {heading}.")
    if bad:
        columns.notes.append(
            f"{len(bad)} rows have another number of cells than the heading and were "
            f"left out, the first is line {bad[0]}."
        )
    return columns


def _rows(
    lines: Iterable[str], sign: str, source: str, above: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line below a heading, and its cells."""
    # A crash may leave NUL in a file, which csv refuses before Python 3.11; and who
    # appends may put a byte-order mark before the names again.
    clean = (line.replace("\0", "").lstrip("\ufeff") for line in lines)
    rows = csv.reader(clean, delimiter=sign)
    try:
        for cells in rows:
            # Spreadsheets part cells by it where the comma is the decimal sign.
            plain = list(map(_with_point, cells)) if sign == ";" else cells
            yield rows.line_num + above, plain
    except csv.Error as error:
        raise LogError(f"{source}, line {rows.line_num + above}: {error}.") from None


def _apart(names: Iterable[str]) -> list[str]:
    """Return headings of which none is the name of two columns."""
    found: list[str] = []
    for name in names:
        others = (f"{name}.{i}" for i in count(1))
        found.append(next(x for x in chain([name], others) if x not in found))
    return found


def _with_point(cell: str) -> str:
    """Return a cell of a table in which a comma is the decimal sign."""
    if cell.count(",") != 1:
        return cell
    whole, _, decimals = cell.partition(",")
    # There a point parts thousands, unless it is the decimal sign after all.
    return cell if "." in decimals else f"{whole.replace('.', '')}.{decimals}"


def read_parquet(path: Path, column: str | None) -> Columns:
    """Return the columns of a Parquet file, through pyarrow."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as missing:
        raise needs("pyarrow", path, missing) from None
    columns = Columns(column)
    try:
        # A whole file as Python's objects would take many times its size.
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                columns.add(row)
    except (ArrowException, OSError) as error:
        raise LogError(f"{path}: not a whole Parquet file: {error}") from None
    return columns


def needs(package: str, path: Path, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error that says which package a format needs."""
    return ModuleNotFoundError(
        f"{path}: reading it needs {package}: pip install {package}", name=error.name
    )
