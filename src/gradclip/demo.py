"""What clipping does, seen on this machine within two minutes and without a download.

A character LSTM learns the source text of Python's own standard library, once without
clipping and once under each of four rules: the same weights at the start, the same
text in the same order, and a learning rate that is too high for steps that nothing
bounds. Every run has a thread of its own, so that all advance side by side.
"""

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from shlex import quote
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.table import Table

from gradclip.characters import Network, Setup, Step, library_text, train
from gradclip.colours import BLACK, GREEN, ORANGE, RED, SKY
from gradclip.policy import only_records
from gradclip.recorder import SCHEMA, plain
from gradclip.rules import Norm, Percentile, Rule, ZScore
from gradclip.ruletext import call
from gradclip.wording import counted

ARMS: dict[str, Rule] = {
    "unclipped": Norm(math.inf),
    "norm-1": Norm(1.0),
    "norm-0.25": Norm(0.25),
    "percentile": Percentile(),
    # The first steps are the ones that explode, and ZScore() only watches them.
    "zscore": ZScore(max_limit=1.0),
}
LINES = (
    (BLACK, "-"),
    (ORANGE, "-"),
    (SKY, "-"),
    (GREEN, "--"),
    (RED, ":"),
)
PICTURE, SUMMARY = "demo.png", "summary.json"
FORMS = {
    "final_loss": ".3f",
    "best_loss": ".3f",
    "median_norm": ".3g",
    "largest_norm": ".3g",
    "clip_rate": ".1%",
}
"""The numbers of the table, and how each is written."""


class Run:
    """The steps of one arm so far, in memory and in a file of JSON lines."""

    def __init__(self, name: str, setup: Setup, out: Path) -> None:
        """Start the file with what it is about."""
        self.name, self.rule, self.setup = name, ARMS[name], setup
        self.path = out / f"{name}.jsonl"
        self.steps: list[Step] = []
        # By lines, so that whatever ends the program leaves whole ones.
        self._file = self.path.open("w", encoding="utf-8", buffering=1)
        self._write(gradclip=SCHEMA, rule=repr(self.rule), run=setup.facts())

    def add(self, step: Step) -> None:
        """Take in the next step."""
        numbers = {name: plain(x) for name, x in step._asdict().items()}
        self._write(step=len(self.steps), **numbers)
        self.steps.append(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")

    @property
    def loss(self) -> NDArray[np.float64]:
        """The loss at every step."""
        return np.array([step.loss for step in self.steps])

    @property
    def norm(self) -> NDArray[np.float64]:
        """The norm before clipping at every step."""
        return np.array([step.norm for step in self.steps])

    @property
    def smooth_loss(self) -> NDArray[np.float64]:
        """The moving mean over an eighth of the run, at most 100 steps."""
        width = min(100, max(1, len(self.steps) // 8))
        return np.lib.stride_tricks.sliding_window_view(self.loss, width).mean(axis=1)

    @property
    def clip_rate(self) -> float:
        """The share of steps with a scale below 1."""
        return sum(step.scale < 1 for step in self.steps) / len(self.steps)

    def summary(self) -> dict[str, Any]:
        """Return the numbers of the table."""
        smooth = self.smooth_loss
        return {
            "rule": repr(self.rule),
            "steps": len(self.steps),
            "final_loss": plain(smooth[-1]),
            "best_loss": plain(min(filter(math.isfinite, smooth), default=math.nan)),
            "median_norm": plain(np.median(self.norm)),
            "largest_norm": plain(np.max(self.norm)),
            "clip_rate": self.clip_rate,
        }


@dataclass(frozen=True)
class Comparison:
    """The runs of all arms that got as far as a first step."""

    setup: Setup
    out: Path
    runs: Sequence[Run]
    interrupted: bool

    def summary(self) -> dict[str, Any]:
        """Return what `summary.json` holds."""
        return {
            "run": self.setup.facts(),
            "interrupted": self.interrupted,
            "arms": {run.name: run.summary() for run in self.runs},
        }


def label(rule: Any) -> str:
    """Return the call that makes a rule, without what it takes by default."""
    return f"{call(rule)}, no clip" if only_records(rule) else call(rule)


def compare(setup: Setup, out: Path, console: Console) -> Comparison:
    """Train all arms side by side and leave their files in a folder.

    Args:
        setup: What the arms have in common.
        out: A folder that exists; files of an earlier demonstration are replaced.
        console: Where the progress is shown.

    Returns:
        The runs, which are shorter if Ctrl-C ended them.
    """
    # If this one is interrupted early, those of another must not stand for it.
    for name in (PICTURE, SUMMARY):
        (out / name).unlink(missing_ok=True)
    interrupted = False
    with ExitStack() as files:
        runs = [files.enter_context(closing(Run(name, setup, out))) for name in ARMS]
        try:
            with progress(runs, console) as report, closing(train_all(runs)) as news:
                for run in news:
                    report(run)
        except KeyboardInterrupt:
            interrupted = True
    started = [run for run in runs if run.steps]
    comparison = Comparison(setup, out, started, interrupted)
    if started:
        summary = json.dumps(comparison.summary(), indent=2)
        (out / SUMMARY).write_text(summary + "\n", "utf-8")
        draw(started, out / PICTURE)
    return comparison


def train_all(runs: Sequence[Run]) -> Generator[Run, None, None]:
    """Train side by side, and yield a run whenever it is one step further."""
    setup = runs[0].setup
    torch.manual_seed(setup.seed)
    network, text = Network(setup), library_text()
    news: Queue[Run | None] = Queue()
    stop = Event()

    def work(run: Run) -> None:
        # The number of threads would decide how torch rounds.
        torch.set_num_threads(1)
        try:
            for step in train(run.rule, network, text, setup):
                if stop.is_set():
                    return
                run.add(step)
                news.put(run)
        finally:
            news.put(None)

    with ThreadPoolExecutor(len(runs)) as pool:
        working = [pool.submit(work, run) for run in runs]
        try:
            # Each worker ends with a None, done or not.
            for _ in runs:
                yield from iter(news.get, None)
        finally:
            stop.set()
    # What went wrong in a thread is raised here.
    for worker in working:
        worker.result()


@contextmanager
def progress(
    runs: Iterable[Run], console: Console
) -> Iterator[Callable[[Run], object]]:
    """Show bars in a terminal, and a line at every tenth of a run anywhere else."""
    if not console.is_interactive:
        yield lambda run: print_tenth(run, console)
        return
    columns = (BarColumn(5), MofNCompleteColumn(), "{task.fields[state]}")
    with Progress("{task.description}", *columns, console=console) as bars:
        tasks = {
            run.name: bars.add_task(
                label(run.rule), total=run.setup.steps, state="starting"
            )
            for run in runs
        }
        yield lambda run: bars.update(
            tasks[run.name], completed=len(run.steps), state=state(run)
        )


def print_tenth(run: Run, console: Console) -> None:
    """Print a line if a run has just done a tenth of its steps."""
    done, steps = len(run.steps), run.setup.steps
    if done % max(1, steps // 10) == 0:
        place = f"step {done:>{len(str(steps))}}/{steps}"
        line = f"{label(run.rule):<24} {place}  {state(run)}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def state(run: Run) -> str:
    """Return where a run stands after its latest step."""
    step = run.steps[-1]
    return f"loss {step.loss:6.3f} norm {step.norm:8.3g} clipped {run.clip_rate:4.0%}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the losses and norms of all runs into a PNG file."""
    # It takes a second to import, which the training should not wait for.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 9), layout="constrained")
    losses, norms = figure.subplots(2, 1, sharex=True)
    for run, (colour, dashes) in zip(runs, LINES, strict=False):
        steps, smooth = np.arange(len(run.steps)), run.smooth_loss
        losses.plot(steps, run.loss, color=colour, alpha=0.15, linewidth=0.8)
        ends = steps[-len(smooth) :]
        losses.plot(ends, smooth, dashes, color=colour, label=label(run.rule))
        norms.plot(steps, run.norm, color=colour, alpha=0.7, linewidth=0.8)
    losses.set(ylabel="loss (strong lines: moving mean)", yscale="log")
    losses.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
    losses.yaxis.set_major_formatter("{x:g}")
    losses.yaxis.set_minor_formatter("")
    norms.set(ylabel="gradient norm before clipping", yscale="log", xlabel="step")
    losses.legend()
    figure.savefig(path, dpi=120)


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what it says, and where the files are."""
    if not comparison.runs:
        console.print("Stopped before the first step was done.")
        return
    console.print(table(comparison.runs))
    files = ", ".join(run.path.name for run in comparison.runs)
    for line in (
        conclusion(comparison),
        *alike(comparison.runs),
        f"Written to {comparison.out}: {PICTURE}, {SUMMARY}, and every step: {files}.",
        f"A page of them all: gradclip report {quote(str(comparison.out))}/*.jsonl",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def table(runs: Iterable[Run]) -> Table:
    """Return the summaries as a table."""
    rows = Table(
        caption="Losses are means over an eighth of the run, at most 100 steps."
    )
    rows.add_column("arm", no_wrap=True)
    for heading in FORMS:
        rows.add_column(heading.replace("_", "\n"), justify="right", no_wrap=True)
    for run in runs:
        numbers = run.summary()
        cells = (format(float(numbers[key]), form) for key, form in FORMS.items())
        rows.add_row(label(run.rule), *cells)
    return rows


def conclusion(comparison: Comparison) -> str:
    """Say where the runs ended, and after how many steps."""
    ends: dict[bool, list[float]] = {False: [], True: []}
    for run in comparison.runs:
        ends[only_records(run.rule)].append(run.smooth_loss[-1])
    ended = [
        f"{who} at a loss of {span(losses, '.3f')}"
        for who, losses in zip(("with clipping", "without"), ends.values(), strict=True)
        if losses
    ]
    steps = span([len(run.steps) for run in comparison.runs], "d")
    setup = comparison.setup
    when = f"After {steps} of {setup.steps} steps at learning rate {setup.lr:g}"
    return f"{when}: {', '.join(ended)}."


def alike(runs: Sequence[Run]) -> Iterator[str]:
    """Say in how few steps the z-score decides otherwise than its limit alone."""
    named = {run.name: run for run in runs}
    if {"norm-1", "zscore"} <= named.keys():
        norm, zscore = named["norm-1"], named["zscore"]
        pairs = list(zip(norm.steps, zscore.steps, strict=False))
        other = sum((a.scale < 1) != (b.scale < 1) for a, b in pairs)
        # At another learning rate, or after more steps, it may be a rule of its own.
        if norm.clip_rate and other <= len(pairs) / 20:
            yield (
                f"{label(zscore.rule)} and {label(norm.rule)} differ in whether they "
                f"clip in {counted(other, 'steps')} of {len(pairs)}: what is dangerous "
                "here is the start, which max_limit holds."
            )


def span(numbers: Sequence[float], form: str) -> str:
    """Return the smallest and the largest number, or the one that they are."""
    low, high = format(np.min(numbers), form), format(np.max(numbers), form)
    return low if low == high else f"{low} to {high}"
