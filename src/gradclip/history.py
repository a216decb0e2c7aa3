"""A run's history: written while it trains, read for advice, replay and the report."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gradclip.arguments import at_least
from gradclip.decision import Info
from gradclip.record import Floats, Record, Steps, Tensors, record_of
from gradclip.recorder import Recorder, checked, is_number, strict
from gradclip.rules import Rule, stages


class History:
    r"""The norm, limit and scale of every step: append to a file, or read one.

    $t,\; \lVert g_t \rVert,\; c_t,\; \min(1, c_t / \lVert g_t \rVert)$ is a line.

    Each line is JSON and complete by itself: a header with the rule and the facts about
    the run, then the steps. A crash loses the steps since the last flush, and never an
    earlier one; opening the file again goes on behind them. Each clipper needs a
    history of its own.

    Args:
        path: The file; it and its folder are made when the first steps are written.
        run: Facts worth keeping, such as the learning rate; anything JSON can hold.
        flush_every: After how many steps they are written, at least 1.
        flush_seconds: After how many seconds they are written, if sooner; at least 0.
        tensors_every: After how many steps the norm of each parameter is recorded, at
            least 0, which never does. Unless it is 0, they are also recorded of each
            step that is dropped for NaN or infinity, on the host. (`gradclip.torch`.)

    Raises:
        ValueError: For a number of steps below its least.

    Example:
        >>> import gradclip as gc, numpy as np, os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "run.jsonl")
        >>> with gc.History(path) as history:
        ...     clipper = gc.Clipper(gc.Norm(3.0), history=history)
        ...     _ = [clipper.clip(np.array([n])) for n in (1.0, 2.0, 6.0)]
        >>> again = gc.History.load(path)
        >>> again.norm.tolist(), again.scale.tolist()
        ([1.0, 2.0, 6.0], [1.0, 1.0, 0.5])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        run: Mapping[str, Any] | None = None,
        flush_every: int = 100,
        flush_seconds: float = 10.0,
        tensors_every: int = 0,
    ) -> None:
        """Check the numbers; no file is touched yet."""
        flush_every, tensors_every = _number(flush_every), _number(tensors_every)
        flush_seconds = _number(flush_seconds)
        at_least(1, flush_every=flush_every)
        at_least(0, tensors_every=tensors_every)
        at_least(0.0, flush_seconds=flush_seconds)
        self.path: Path | None = Path(path)
        self.tensors_every = tensors_every
        self._recorder: Recorder | None = Recorder(
            self.path, run or {}, flush_every, flush_seconds
        )
        self._record: Record | None = None
        self._count = 0

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        column: str | None = None,
    ) -> "History":
        """Read a history, or the log of another tool.

        Args:
            path: A file or folder: gradclip's own, Hugging Face's `trainer_state.json`,
                TensorBoard events, Lightning's `metrics.csv`, an MLflow store, CSV,
                JSON lines, Parquet, or what a trainer printed; gzip is unpacked, and a
                pipe or `-` (standard input) is read whole.
            format: What it is, where the guess is wrong; see `gradclip.readers`.
            column: Which column holds the norm before clipping, where the guess is
                wrong.

        Returns:
            A history to read from; `format`, `column` and `notes` say how it was read.

        Raises:
            LogError: If the file is damaged or holds no gradient norm.
            FileNotFoundError: If there is no such file.
            ModuleNotFoundError: If a format needs a package that is not installed.
        """
        # A training only writes, and need not load the readers of all formats.
        from gradclip.readers import read

        return cls.from_record(read(Path(path), format, column), Path(path))

    @classmethod
    def of(
        cls,
        norm: Sequence[float] | Floats,
        *,
        step: Sequence[int] | Steps | None = None,
        limit: Sequence[float] | Floats | float = np.nan,
        scale: Sequence[float] | Floats | None = None,
        loss: Sequence[float] | Floats | float = np.nan,
    ) -> "History":
        """Make a history from numbers at hand.

        Args:
            norm: The norms before clipping.
            step: Their steps; counted from 0 if not given.
            limit: The limits; NaN where not known.
            scale: The factors; from norm and limit if not given.
            loss: The losses; NaN where not known.

        Returns:
            A history to read from.

        Raises:
            ValueError: For as many of one as there are not of the norms.

        Example:
            >>> import gradclip as gc
            >>> gc.History.of([1.0, 4.0], limit=2.0).scale.tolist()
            [1.0, 0.5]
        """
        return cls.from_record(record_of(norm, step, limit, scale, loss), None)

    @classmethod
    def from_record(cls, record: Record, path: Path | None) -> "History":
        """Make a history from a record that was read."""
        # Not by __init__, which makes a recorder: what was read takes no steps.
        history = cls.__new__(cls)
        history.path, history.tensors_every = path, 0
        history._recorder, history._record = None, record
        return history

    def arguments(self) -> dict[str, Any]:
        """Return what makes a history for the same file again, as JSON can hold it.

        Returns:
            The arguments by name; of the facts in `run`, what is no JSON is a text.

        Raises:
            TypeError: For a history that was loaded, which writes no file.

        Example:
            >>> import gradclip as gc
            >>> gc.History("run.jsonl", tensors_every=5).arguments()["tensors_every"]
            5
        """
        recorder = self._writing()
        given = {
            "path": str(recorder.path),
            "run": recorder.run,
            "flush_every": recorder.flush_every,
            "flush_seconds": recorder.flush_seconds,
            "tensors_every": self.tensors_every,
        }
        # There and back: a trainer keeps this as JSON, which has no paths or arrays.
        plain: dict[str, Any] = json.loads(strict(given, _plain))
        return plain

    def begin(self, rule: Rule | str) -> None:
        """Note what clips in the steps to come; a clipper does this.

        Another rule than before gets a header of its own in the file.

        Args:
            rule: The rule, or what to call it.

        Raises:
            TypeError: For a history that was loaded, which takes no new steps.
        """
        if isinstance(rule, str):
            self._writing().begin(rule, 2.0)
        else:
            # Of a chain, the norm that is recorded is that of the first stage.
            self._writing().begin(repr(rule), stages(rule)[0].p)

    def record(self, step: Any, info: Info, **facts: Any) -> None:
        """Take in one step; nothing is read from an accelerator before a flush.

        Args:
            step: The number of the step, counted from 0; an integer or a 0-d array.
                One that was recorded before starts a new branch, as after going back
                to a checkpoint.
            info: What the clipping did.
            facts: More numbers for the same line, such as `loss`; None is no number.

        Raises:
            TypeError: For a fact that is no number, 0-d array or text; nothing is
                lost then. And for a history that was loaded.
            ValueError: For a fact under a name of the history's own, such as `norm`.
        """
        self._writing().add(step, info, checked(facts))
        self._count += 1

    def wants_tensors(self, bad: bool = False) -> bool:
        """Return whether the norm of each parameter is due at this step.

        Args:
            bad: Whether the step is dropped for NaN or infinity.
        """
        return self.tensors_every > 0 and (bad or self._count % self.tensors_every == 0)

    def record_tensors(self, step: Any, names: Sequence[str], norms: Any) -> None:
        """Take in the norm of each parameter.

        Args:
            step: As for `record`.
            names: The names of the parameters.
            norms: An array with their norms, NaN for one without a gradient.

        Raises:
            TypeError: For a history that was loaded, which takes no new steps.
        """
        self._writing().add_tensors(step, tuple(names), norms)

    def flush(self) -> None:
        """Write what was taken in so far; warns once where that is impossible."""
        if self._recorder:
            self._recorder.flush()

    def close(self) -> None:
        """Write the last steps. Further ones may follow."""
        self.flush()

    def __enter__(self) -> "History":
        """Return the history itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the last steps."""
        self.close()

    def _writing(self) -> Recorder:
        if self._recorder is None:
            raise TypeError(
                "this history was loaded, and takes no new steps; use "
                "gradclip.History(path) to write one."
            )
        return self._recorder

    @property
    def recorded(self) -> Record:
        """All that was recorded; a history that is written is read back."""
        if self._record is not None:
            return self._record
        self.flush()
        # Before the first step, or where the file could not be written.
        if self.path is None or not self.path.exists():
            return record_of([])
        from gradclip.readers import read

        return read(self.path, "gradclip", None)

    @property
    def step(self) -> Steps:
        """The number of each step."""
        return self.recorded.step

    @property
    def norm(self) -> Floats:
        """The norm before clipping at each step."""
        return self.recorded.norm

    @property
    def limit(self) -> Floats:
        """The limit at each step; NaN where the log does not tell."""
        return self.recorded.limit

    @property
    def scale(self) -> Floats:
        """The factor applied at each step; NaN where the log does not tell."""
        return self.recorded.scale

    @property
    def loss(self) -> Floats:
        """The loss at each step; NaN where the log does not tell."""
        return self.recorded.loss

    @property
    def tensors(self) -> Tensors | None:
        """The norms of the parameters, where they were recorded."""
        return self.recorded.tensors

    @property
    def run(self) -> dict[str, Any]:
        """The facts about the newest run, as `run=` was given."""
        return dict(self.recorded.facts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd about the log, in sentences."""
        return self.recorded.notes

    @property
    def runs(self) -> list["History"]:
        """The runs that the log holds, each as a history of its own."""
        record, names = self.recorded, np.unique(self.recorded.run)
        return [History.from_record(record.of_run(name), self.path) for name in names]

    def __len__(self) -> int:
        """Return the number of recorded steps."""
        return int(self.recorded.norm.size)

    def __repr__(self) -> str:
        """Show where it comes from and how long it is."""
        if self._recorder:
            return f"History({str(self.path)!r})"
        record = self.recorded
        where = f"{self.path}: " if self.path else ""
        return f"<History {where}{record.norm.size} steps, {record.format}>"


def recorded(call: str, history: Any) -> Record:
    """Return what a history holds, or say what a function takes."""
    if not isinstance(history, History):
        raise TypeError(
            f"{call}: {history!r:.60} is no history; use History.load(path) for a "
            "file, and History.of(norms) for numbers."
        )
    return history.recorded


def _number(x: Any) -> Any:
    """Return infinity for its name, by which `arguments` has it."""
    return math.inf if isinstance(x, str) and x == "Infinity" else x


def _plain(x: Any) -> Any:
    """Return a number of any library as Python's, and anything else as a text."""
    return x.item() if is_number(x) else str(x)
