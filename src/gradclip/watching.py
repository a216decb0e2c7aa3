"""The terminal view of a run in progress: it follows what is appended."""

import time
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gradclip.advice.spikes import find_spikes
from gradclip.history import History
from gradclip.readers import OF_FOLDER
from gradclip.record import Floats, LogError, Record
from gradclip.wording import sentence

BARS = "▁▂▃▄▅▆▇█"
RECENT = 2000
"""How many of the last steps the rates and spikes are about."""


def follow(path: Path, once: bool, every: float) -> None:
    """Show a run until Ctrl-C, and again whenever its file has grown.

    Args:
        path: The history or log.
        once: Show it one time only.
        every: Seconds between two looks at the file.
    """
    console = Console()
    if once:
        console.print(view(History.load(path).recorded, path, console.width))
        return
    seen: tuple[int, ...] = ()
    took = 0.0
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                # Reading again is what takes time, looking at the size does not.
                state = _state(path)
                if state != seen:
                    # Before it is read: what is written meanwhile is seen next.
                    seen, begun = state, time.monotonic()
                    live.update(_now(path, console.width), refresh=True)
                    took = time.monotonic() - begun
                # A long log may not take a core from the training beside it.
                time.sleep(max(every, 10 * took))
        except KeyboardInterrupt:
            return


def _state(path: Path) -> tuple[int, ...]:
    """Return what differs once a log has changed, even into another one as long."""
    try:
        # A log may be a folder, which notes when a file in it was exchanged.
        found = [path.stat(), *(x.stat() for x in path.rglob("*") if x.exists())]
    # What is saved for a moment may vanish while it is counted; the next look tells.
    except FileNotFoundError:
        return (-1,)
    newest = max(stat.st_mtime_ns for stat in found)
    return sum(stat.st_size for stat in found), newest, found[0].st_ino


def _now(path: Path, width: int) -> Group:
    try:
        return view(History.load(path).recorded, path, width)
    # There may be no file yet, or one without a step.
    except (LogError, FileNotFoundError) as error:
        return Group(Text(f"Waiting for the first steps. {error}"))


def view(record: Record, path: Path, width: int) -> Group:
    """Return what is shown of a run.

    Args:
        record: What is recorded so far.
        path: Where.
        width: How many characters a line has.

    Returns:
        A few lines for rich.
    """
    recent = record.take(slice(-RECENT, None))
    spikes = find_spikes(recent)[-5:]
    last = f"step {record.step[-1]}  norm {record.norm[-1]:.4g}"
    lines = [
        f"{path}  {record.rule}",
        f"{last}  limit {record.limit[-1]:.4g}  clip rate {_rate(recent)}",
        sparkline(recent.norm, max(10, width - 2)),
        "spikes: "
        + (", ".join(f"{s.step} ({s.norm:.3g})" for s in spikes) or "none lately"),
        # Of the notes this one alone, as it says what one looks at.
        *(sentence(note) for note in record.notes if note.startswith(OF_FOLDER)),
    ]
    return Group(*(Text(line, overflow="ellipsis", no_wrap=True) for line in lines))


def _rate(record: Record) -> str:
    known = record.scale[~np.isnan(record.scale)]
    return f"{np.mean(known < 1):.1%}" if known.size else "unknown"


def sparkline(norm: Floats, width: int) -> str:
    """Return norms as bars on a logarithmic scale; each shows the largest of its part.

    Example:
        >>> import numpy as np
        >>> sparkline(np.array([1.0, 2.0, 4.0, np.inf]), 10)
        '▁▅█!'
    """
    parts = np.array_split(norm, min(width, norm.size))
    peaks = np.array([np.max(np.where(np.isnan(part), np.inf, part)) for part in parts])
    shown = np.isfinite(peaks) & (peaks > 0)
    ends = peaks[shown] if shown.any() else np.ones(1)
    low, high = np.log(ends.min()), np.log(ends.max())
    with np.errstate(all="ignore"):
        level = (np.log(peaks) - low) / max(high - low, 1e-9) * (len(BARS) - 1)
    return "".join(
        BARS[round(float(x))] if ok else "!" if not np.isfinite(peak) else " "
        for x, ok, peak in zip(level, shown, peaks, strict=True)
    )
