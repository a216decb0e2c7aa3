"""Writing a history while a training runs, without making the training wait.

Numbers stay where they were made, on an accelerator too, until a batch of steps is
written with one call. A file that cannot be written costs the record, never the run.
"""

import atexit
import json
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from gradclip.decision import Info
from gradclip.host import host_array, norm_of_cells, smallest, to_numpy

SCHEMA = 1
OWN = {"gradclip", "names", "step", "tensors", "norm", "limit", "scale", "action"}
"""Names that a line, or the header, has for itself."""
Taken: TypeAlias = tuple[Any, Info, dict[str, Any]]
TakenTensors: TypeAlias = tuple[Any, tuple[str, ...], Any]


class Recorder:
    """Collect steps, and append them to a file of JSON lines in batches."""

    def __init__(
        self, path: Path, run: Mapping[str, Any], flush_every: int, flush_seconds: float
    ) -> None:
        """Keep what the header says; nothing is written before the first flush."""
        self.path, self.run = path, writable(run)
        self.flush_every, self.flush_seconds = flush_every, flush_seconds
        self.rule, self.p = "", 2.0
        self.ranks: Sequence[int] = ()
        self._written_names: Sequence[str] | None = None
        self._steps: list[Taken] = []
        self._tensors: list[TakenTensors] = []
        self._written_rule: str | None = None
        self._warned, self._shared, self._owner = False, False, os.getpid()
        self._flushed = time.monotonic()
        self._end, self._others = 0, 0
        _flush_at_exit(self)

    def __del__(self) -> None:
        """Write what is left, where a history ends before the program does."""
        # At the very end of a program there may be nothing left to write with, nor
        # `contextlib.suppress`.
        try:  # noqa: SIM105
            self.flush()
        except Exception:
            pass

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the buffer: a copy must not write it once more."""
        return {**self.__dict__, "_steps": [], "_tensors": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a recorder that writes its own last steps, too."""
        self.__dict__.update(state)
        _flush_at_exit(self)

    def _own(self) -> None:
        """Start anew in a process that was forked, or was sent this recorder."""
        if os.getpid() != self._owner:
            self._steps, self._tensors = [], []
            self._written_rule, self._written_names = None, None
            self._end, self._others = 0, 0
            self._owner = os.getpid()
            _flush_at_exit(self)

    def begin(self, rule: str, p: float) -> None:
        """Note what clips in the steps to come, and the order of its norms."""
        # What was taken in before belongs to the rule that was noted before.
        self.flush()
        self.rule, self.p = rule, p

    def add(self, step: Any, info: Info, facts: dict[str, Any]) -> None:
        """Keep one step, and write all that are kept if it is time to."""
        self._own()
        self._steps.append((step, info, facts))
        late = time.monotonic() - self._flushed > self.flush_seconds
        if len(self._steps) >= self.flush_every or late:
            self.flush()

    def add_tensors(self, step: Any, names: tuple[str, ...], norms: Any) -> None:
        """Keep the norm of each parameter at one step."""
        self._own()
        self._tensors.append((step, names, norms))

    def flush(self) -> None:
        """Write what is kept; of the processes of a model, only the first one does."""
        steps, tensors = self._steps, self._tensors
        # Emptied first: what a full disk refuses is lost, and does not pile up.
        self._steps, self._tensors, self._flushed = [], [], time.monotonic()
        # A forked data loader inherits the buffer, and must not write it a second time.
        if not (steps or tensors) or os.getpid() != self._owner:
            return
        if process_rank() > min(self.ranks, default=0):
            return
        self._write(steps, tensors)

    def _write(self, steps: Sequence[Taken], tensors: Sequence[TakenTensors]) -> None:
        numbers = list(map(int, to_numpy([x for x, *_ in steps]))) if steps else []
        try:
            # Tensors first: a reader looks for their step in the lines behind them.
            lines = [
                *self._head(),
                *self._tensor_lines(tensors),
                *step_lines(steps, numbers, self.p),
            ]
            begun, end = append(self.path, "".join(line + "\n" for line in lines))
            # Once may be what another History had left, as in a notebook.
            self._others += 0 < self._end < begun
            self._written_rule, self._end = self.rule, end
        except OSError as error:
            # What was written of it is our own.
            self._end = 0
            self._warn(error)
        self._look_for_turns(numbers)

    def _head(self) -> list[str]:
        """Return the header line where this file still needs one from us."""
        # A file that was moved away, or emptied, begins anew: with the names, too.
        begun = self.path.exists() and self.path.stat().st_size > 0
        if begun and self._written_rule == self.rule:
            return []
        self._written_names = None
        head = {"gradclip": SCHEMA, "rule": self.rule, "run": self.run}
        return [strict(head, str)]

    def _warn(self, error: OSError) -> None:
        # The line with the names may be among those that were lost.
        self._written_names = None
        # Once, or a full disk would warn at every flush.
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the history {self.path} cannot be written: "
                f"{error.strerror or error}; the training goes on, and steps are lost "
                "from the record.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _look_for_turns(self, numbers: Sequence[int]) -> None:
        """Warn, once, where several write: their lines say nothing of which."""
        if not self._shared and (take_turns(numbers) or self._others > 1):
            self._shared = True
            how = "gets its steps more than once, as from two clippers"
            if self._others > 1:
                how = "grows between these steps: something else writes to it, too"
            warnings.warn(
                f"the history {self.path} {how}, and no line tells which it is from. "
                "Give each clipper and each process a History of its own, or set RANK "
                "where only the first process should write.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tensor_lines(self, tensors: Sequence[TakenTensors]) -> list[str]:
        lines = []
        for step, names, norms in tensors:
            if self._written_names != names:
                lines.append(json.dumps({"names": names}))
                self._written_names = names
            values = [short(x) for x in to_numpy([norms])[0].tolist()]
            lines.append(json.dumps({"step": int(step), "tensors": values}))
        return lines


def tell_ranks(history: Any, ranks: Sequence[int]) -> None:
    """Tell a history which processes have a model, where not all of them do.

    The first one of all may be none of them, and then nobody would write.
    """
    recorder = getattr(history, "_recorder", None)
    if isinstance(recorder, Recorder):
        recorder.ranks = ranks


def append(path: Path, text: str) -> tuple[int, int]:
    """Append text to a file in one write, on a line of its own.

    Returns where the file ended before, and where it ends now.

    A write that was cut short by a crash or a full disk leaves a torn line behind; the
    next text does not continue it.
    """
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened anew for each batch: nothing is left open to be copied, forked or rotated.
    with path.open("a+b", buffering=0) as file:
        begun = file.seek(0, os.SEEK_END)
        if begun:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        # Without a buffer, a write may take less than it was given.
        while data:
            data = data[file.write(data) :]
        return begun, file.tell()


def process_rank() -> int:
    """Return which of several processes this is, by torch or its launcher."""
    # Where torch is not loaded, nothing can have started its process group.
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def take_turns(numbers: Sequence[int]) -> bool:
    """Return whether steps go back, and then on from before, about every second time.

    Who goes back to a checkpoint goes on from there, and not as often.
    """
    steps = list(zip(numbers, numbers[1:], numbers[2:], strict=False))
    turns = sum(b <= a and c == a + 1 for a, b, c in steps)
    return turns > 2 and sum(b <= a for a, b, _ in steps) > 0.4 * len(steps)


def step_lines(
    steps: Sequence[Taken], numbers: Sequence[int], p: float = 2.0
) -> list[str]:
    """Return one line for each step, with one copy from the device for all.

    `numbers` are those of the steps, and `p` is the order of the norms, where a step
    has several.
    """
    if not steps:
        return []
    infos = [info for _, info, _ in steps]
    norms, limits, scales, kept, finite, clipped = (
        to_numpy([getattr(info, name) for info in infos])
        for name in ("norm", "limit", "scale", "kept", "finite", "clipped")
    )
    return [
        _line(
            {"step": numbers[i], **facts},
            norm_of_cells(norms[i], p, bool(finite[i])),
            norm_of_cells(limits[i], p),
            smallest(scales[i]),
            "skip" if not kept[i] else "clip" if clipped[i] else "pass",
        )
        for i, (_, _, facts) in enumerate(steps)
    ]


def _line(
    facts: dict[str, Any], norm: float, limit: float, scale: float, action: str
) -> str:
    entry = facts | {"norm": norm, "limit": limit, "scale": scale}
    # A count stays whole; as a float it would be written as 7.0.
    plainly = {
        name: x if isinstance(x, (int, str)) else plain(x) for name, x in entry.items()
    }
    # Other tools refuse the bare NaN that Python would write.
    return json.dumps({**plainly, "action": action}, allow_nan=False)


def checked(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a line can hold, or refuse it before it is kept with others."""
    if own := sorted(OWN & facts.keys()):
        raise ValueError(
            f"record({own[0]}=…): a history has this name for itself; give the fact "
            "another one."
        )
    for name, x in facts.items():
        if not (x is None or isinstance(x, int | float | str) or is_number(x)):
            raise TypeError(
                f"record({name}={x!r}): a line holds numbers, 0-d arrays and texts."
            )
    return {name: math.nan if x is None else x for name, x in facts.items()}


def is_number(x: Any) -> bool:
    """Return whether something is a 0-d array of a real number, of any library."""
    kind = str(getattr(x, "dtype", ""))
    real = any(word in kind for word in ("float", "int", "bool"))
    return getattr(x, "shape", None) == () and real


def writable(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about a run, or refuse what the header cannot hold."""
    try:
        json.dumps(facts := dict(run), default=str)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"History(run={run!r}): the header is JSON, and that has no place: {error}."
        ) from None
    return facts


def strict(facts: Mapping[str, Any], default: Callable[[Any], Any]) -> str:
    """Return facts as JSON that other tools read: NaN and infinity by their names.

    `default` is what makes JSON of anything else.
    """
    # Only by reading them is each bare NaN found, however deep it lies.
    plainly = json.loads(json.dumps(facts, default=default), parse_constant=str)
    return json.dumps(plainly, allow_nan=False)


def plain(number: Any) -> float | str:
    """Return a number as JSON can hold it: NaN and infinity by their names."""
    x = float(host_array(number))
    if math.isfinite(x):
        return x
    return "NaN" if math.isnan(x) else "Infinity" if x > 0 else "-Infinity"


def short(number: float) -> float | str:
    """Return a number with the digits that a picture needs."""
    return plain(float(f"{number:.5g}"))


def _flush_at_exit(recorder: Recorder) -> None:
    """Write the last steps when the program ends, if the recorder still lives."""
    # Weakly, or a recorder that nobody has any more would live until the end.
    alive = weakref.ref(recorder)

    def flush() -> None:
        if last := alive():
            last.flush()

    atexit.register(flush)
