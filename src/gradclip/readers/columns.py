"""From rows of any log to columns of numbers: what a number looks like in the wild."""

import json
import math
import re
from array import array
from collections.abc import Mapping
from typing import Any

WORTH_KEEPING = re.compile(r"norm|clip|step|iter|epoch|update|loss|limit|scale", re.I)
ROUNDED = re.compile(r"(?:\.(\d*))?e\+(\d+)")
COMMA = re.compile(r"[-+]?\d+,\d+")
GROUPED = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d*)?")
"""A number whose digits are parted by commas."""
PLAIN = re.compile(r" *-?[0-9]+(?:\.[0-9]+)?\s*")
"""What nearly all cells are, and a long log has millions: no need to ask further."""
WHOLE = 2.0**53
"""From here on a float skips integers, so that it cannot be a step."""


class Column:
    """The numbers under one name, each with the row it stood in."""

    def __init__(self) -> None:
        """Start without a number."""
        self.rows, self.values = array("q"), array("d")
        self.bad, self.first_bad = 0, ""
        """How many cells hold no number, and what the first of them holds."""
        self.rounded = False
        """Whether a number came as `2.06e+04`, so that its last digits are lost."""
        self._doubtful = array("q")
        """Which numbers came as `1,148`, that could be either."""
        self._decimal = False
        """Whether one came as `0,594`, in which the comma is the decimal sign."""

    def add(self, row: int, text: Any) -> None:
        """Take in what stands in a row, if it is a number."""
        if type(text) is str and PLAIN.fullmatch(text):
            self.rows.append(row)
            self.values.append(float(text))
            return
        value = number(text)
        if value is None:
            if isinstance(text, str) and text.strip():
                self.bad += 1
                self.first_bad = self.first_bad or text.strip()
            return
        self.rows.append(row)
        self.values.append(value)
        if not isinstance(text, str):
            return
        if found := ROUNDED.search(text):
            decimals, exponent = found.groups()
            self.rounded |= len(decimals or "") < int(exponent)
        if found := COMMA.fullmatch(text.strip()):
            self._weigh_comma(bool(GROUPED.fullmatch(found.group())))

    def _weigh_comma(self, doubtful: bool) -> None:
        """Take the numbers with a comma as decimal ones, once one cannot be another."""
        if doubtful:
            self._doubtful.append(len(self.values) - 1)
        self._decimal |= not doubtful
        if self._decimal:
            for i in self._doubtful:
                self.values[i] /= 1000
            self._doubtful = array("q")


class Columns:
    """The columns of a log that may matter, and the names of all others."""

    def __init__(self, wanted: str | None = None) -> None:
        """Keep the column that was asked for, whatever it is called."""
        self.wanted, self.count = wanted, 0
        self.found: dict[str, Column] = {}
        self.ignored: set[str] = set()
        self.limit = math.nan
        """The limit in force, where the log mentions one."""
        self.notes: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in one row."""
        self._put_all(row, "")
        self.count += 1

    def _put_all(self, row: Mapping[str, Any], above: str) -> None:
        """Take in the cells of a row; those in a dictionary under the names of both."""
        for name, value in row.items():
            whole = f"{above}{name}" if above else name
            if isinstance(value, dict):
                self._put_all(value, f"{whole}/")
            # A null may stand for a norm, and makes no column of anything else.
            elif value is not None or whole in self.found or "norm" in whole:
                self._put(whole, value)

    def _put(self, name: str, value: Any) -> None:
        column = self.found.get(name)
        if column is None:
            # Remembered, since a search for each cell of a wide log takes long.
            if name in self.ignored:
                return
            if name != self.wanted and not WORTH_KEEPING.search(name):
                self.ignored.add(name)
                return
            column = self.found[name] = Column()
        column.add(self.count, value)

    @property
    def names(self) -> list[str]:
        """The names of all columns, with or without numbers."""
        return sorted([*self.found, *self.ignored])


def parsed(line: str) -> Any:
    """Return what a line of JSON holds, and None for what is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def number(text: Any) -> float | None:
    """Return the number that a cell holds; NaN for null, None for no number at all.

    Example:
        >>> [number(x) for x in ("7,718", "1/294", "1e3", "-inf", "", "abc", True)]
        [7718.0, 1.0, 1000.0, -inf, None, None, None]
    """
    if text is None:
        return math.nan
    # To Python, True is the number 1.
    if isinstance(text, bool):
        return None
    if isinstance(text, (int, float)):
        return _float(text)
    return _from_text(text) if isinstance(text, str) else None


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        # JSON has integers of any length.
        return math.inf


def _from_text(text: str) -> float | None:
    text = text.strip().strip("'\"")
    if (named := _not_finite(text.lower())) is not None:
        return named
    if "/" in text:
        # Hugging Face's 'global_step/max_steps': '1/294'.
        text = text.partition("/")[0]
    # In groups of three, a comma is no decimal sign.
    text = text.replace(",", "" if GROUPED.fullmatch(text) else ".")
    try:
        return float(text) if text[:1] not in "_nN" else None
    except ValueError:
        return None


def _not_finite(text: str) -> float | None:
    """Return infinity or NaN where a cell says so, in any spelling."""
    word = text.lstrip("+-")
    if word in ("nan", "null", "none"):
        return math.nan
    if word in ("inf", "infinity") or word.startswith("1.#inf"):
        return -math.inf if text.startswith("-") else math.inf
    # 1.#IND and 1.#QNAN, from which rounding may take letters.
    return math.nan if word.startswith("1.#") else None
