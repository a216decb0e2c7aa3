"""Bars of tqdm: which of those that show one step have its numbers.

A bar that moves on shows the numbers of the step before, until `set_postfix` hands it
others. In a loop that is faster than its bar, the count stands still meanwhile.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

Bar = dict[str, Any]
Row = tuple[str, Bar]
TOOL = "tqdm"
PLACE = ("epoch", "step", "of")
"""What says where a bar stands; all else in its row are numbers of a step."""
END: Row = ("", {})


def settled(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows of a log, and of its bars those with the numbers of their step."""
    bars: list[Bar] = []
    shown: Bar = {}
    for tool, row in chain(rows, [END]):
        if tool == TOOL and bars and _place(row) == _place(bars[0]):
            bars.append(row)
            continue
        if bars:
            behind = row if tool == TOOL else {}
            yield from ((TOOL, bar) for bar in _of_their_steps(bars, shown, behind))
            shown, bars = _numbers(bars[-1]), []
        if tool == TOOL:
            bars = [row]
        elif tool:
            yield tool, row


def _place(bar: Bar) -> tuple[Any, ...]:
    return tuple(bar.get(name) for name in PLACE)


def _numbers(bar: Bar) -> Bar:
    return {name: x for name, x in bar.items() if name not in PLACE}


def _norms(bar: Bar) -> Bar:
    return {name: x for name, x in bar.items() if "norm" in name}


def _of_their_steps(bars: list[Bar], shown: Bar, behind: Bar) -> list[Bar]:
    """Return the bars at one count that have the numbers of a step, each with its own.

    `shown` is what the bar before them had, `behind` the bar that moves on.
    """
    # At its end the bar of a loop moves on once more, and no step comes with it.
    ended = bars[0]["step"] == bars[0].get("of")
    if ended and all(_numbers(bar) == shown for bar in bars):
        return []
    fresh = _with_others(bars)
    if len(fresh) > 1 and _norms(bars[0]) == _norms(shown):
        fresh = fresh[1:]
    first = int(bars[0]["step"])
    if len(fresh) > max(1, _until(behind, bars[0]) - first):
        # A bar of epochs, or one that was cut off: its count is not that of steps.
        return list(map(_numbers, fresh))
    return [
        _numbers(bar) | {"step": first + i} | _epoch(bar) for i, bar in enumerate(fresh)
    ]


def _with_others(bars: list[Bar]) -> list[Bar]:
    """Return the last of bars with one norm, as they come: some are drawn again."""
    pairs = zip(bars, [*bars[1:], {}], strict=True)
    return [bar for bar, after in pairs if _norms(bar) != _norms(after)]


def _until(behind: Bar, bar: Bar) -> int:
    """Return the count that a bar moves on to, which is never beyond its end."""
    on = int(behind.get("step", 0))
    return min(on, int(bar.get("of", on)))


def _epoch(bar: Bar) -> Bar:
    return {name: x for name, x in bar.items() if name == "epoch"}
