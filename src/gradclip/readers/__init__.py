"""Readers: one small file for each kind of log, and the guess which one a file is.

Formats: `gradclip`, `huggingface`, `tensorboard`, `csv`, `jsonl`, `json`, `parquet`,
`mlflow`, `notebook`, `console`. Lightning's `metrics.csv` is CSV.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from gradclip.readers import console, documents, events, mlflow, own, tabular
from gradclip.readers.assemble import assemble
from gradclip.readers.columns import Columns, parsed
from gradclip.readers.plain import plain_file
from gradclip.record import LogError, Record

FORMATS = (
    "gradclip",
    "huggingface",
    "tensorboard",
    "csv",
    "jsonl",
    "json",
    "parquet",
    "mlflow",
    "notebook",
    "console",
)
HEAD = 1 << 16
KNOWN_FILES = ("trainer_state.json", "metrics.csv", "progress.csv")
OF_FOLDER = "of this folder,"
"""What a note begins with that says what was read of a folder."""
COUNT = re.compile(r"(?<![\d.])\d+(?!\.?\d)")
"""A number that counts, as that of a checkpoint does, and 0.25 does not."""
WANDB = b":W&B"
"""What Weights & Biases begins the file of a run with."""


def read(path: Path, format: str | None = None, column: str | None = None) -> Record:
    """Return the record of a log.

    Args:
        path: A file, a folder, a pipe, or `-` for standard input; gzip is unpacked.
        format: One of `FORMATS`; guessed from the content if not given.
        column: The column with the norm before clipping; guessed if not given.

    Returns:
        The record; its format says what the log was taken for.

    Raises:
        LogError: If the log is damaged or holds no gradient norm.
        ValueError: For an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r}: use one of {', '.join(FORMATS)}.")
    with plain_file(path) as file:
        inside, note = _inside(file, format)
        record = _read(inside, format, column)
    return record.also(note) if note else record


def _read(path: Path, format: str | None, column: str | None) -> Record:
    format = format or guess(path)
    if format == "gradclip" and column in (None, "norm"):
        return own.read(path)
    columns, what = _columns(path, format, column)
    return assemble(columns, str(path), what)


def _columns(path: Path, format: str, column: str | None) -> tuple[Columns, str]:
    source = str(path)
    match format:
        case "tensorboard":
            return events.read(path, column), "TensorBoard"
        case "mlflow":
            return mlflow.read(path, column), "MLflow"
        case "parquet":
            return tabular.read_parquet(path, column), "Parquet"
        case "csv":
            return tabular.read_csv(lines_of(path), source, column), "CSV"
        case "jsonl" | "gradclip":
            return documents.read_lines(lines_of(path), source, column), "JSON lines"
        case "console":
            return console.read(lines_of(path), source, column)
    document = documents.read_document(path)
    if format == "notebook" or (isinstance(document, dict) and "nbformat" in document):
        printed = documents.notebook_lines(document)
        columns, tool = console.read(printed, source, column)
        return columns, f"{tool} in a notebook"
    return documents.columns_of(document, path, column)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text; a carriage return ends one, too."""
    # A byte that is no UTF-8 spoils one line, and must not cost the log.
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        yield from file


def _inside(path: Path, format: str | None) -> tuple[Path, str]:
    """Return the log in a folder, and a note; folders that are a log are themselves."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if not path.is_dir() or format == "tensorboard":
        return path, ""
    databases = list(path.rglob(mlflow.DATABASE))
    if format == "mlflow":
        stored = not databases or mlflow.runs_in(path)
        return (path, "") if stored else _newest(path, databases)
    own = [x for x in path.rglob("*.jsonl") if x.is_file() and _is_own(x)]
    if any(path.rglob(events.PATTERN)):
        return path, _passed_by(path, own, "TensorBoard's event files were")
    if mlflow.holds_runs(path):
        return path, _passed_by(path, own, "MLflow's store was")
    for name in KNOWN_FILES:
        if found := [x for x in path.rglob(name) if x.is_file()]:
            return _newest(path, found)
    if own or databases:
        return _newest(path, own or databases)
    # A copy of a run's metrics may have come without its mark.
    if mlflow.runs_in(path):
        return path, ""
    if any(path.rglob("*.wandb")):
        raise _is_wandbs(path)
    inside = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
    raise LogError(
        f"{path}: a folder without a log that gradclip knows; it has {inside}. Name "
        "the file."
    )


def _newest(folder: Path, found: Sequence[Path]) -> tuple[Path, str]:
    """Return the newest of the logs of a kind in a folder, and a note."""
    newest, by = max(found, key=_natural), "by its number"
    # Whole numbers count what one run has left behind; other names are in no order.
    if len({COUNT.sub("", str(path)) for path in found}) > 1:
        newest = max(found, key=lambda path: (path.stat().st_mtime_ns, _natural(path)))
        by = "by when it was written"
    of = f", the newest of {len(found)} {by}" if len(found) > 1 else ""
    return newest, f"{OF_FOLDER} {newest.relative_to(folder)} was read{of}."


def _passed_by(folder: Path, own: Sequence[Path], what: str) -> str:
    """Return a note where a folder holds histories that are not read."""
    if not own:
        return ""
    names = " or ".join(sorted(str(path.relative_to(folder)) for path in own)[:5])
    return f"{OF_FOLDER} {what} read; for gradclip's own history name {names}."


def _is_wandbs(path: Path) -> LogError:
    """Return the error for a run of Weights & Biases, which only they can read."""
    return LogError(
        f"{path}: a run of Weights & Biases, in a format of their own. Upload it with "
        "'wandb sync' if it is not yet, export its grad norm as CSV, and read that; or "
        "keep a gradclip.History beside it."
    )


def _is_own(path: Path) -> bool:
    """Return whether a file is a history of gradclip's."""
    with path.open("rb") as file:
        return file.read(12).startswith(b'{"gradclip":')


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return what sorts checkpoint-1000 behind checkpoint-500."""
    words = re.findall(r"\d+|\D+", str(path))
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def guess(path: Path) -> str:
    """Return which of the formats a log is, from what it begins with.

    Raises:
        LogError: If it is empty or holds no text.
    """
    if path.is_dir():
        return "tensorboard" if any(path.rglob(events.PATTERN)) else "mlflow"
    with path.open("rb") as file:
        start = file.read(HEAD)
    head = start.decode("utf-8-sig", errors="replace")
    if not head.strip():
        raise LogError(f"{path}: the file is empty.")
    # Event files begin with a length, which is no mark: only their name tells.
    if "tfevents" in path.name:
        return "tensorboard"
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(mlflow.SQLITE):
        return "mlflow"
    if start.startswith(WANDB):
        raise _is_wandbs(path)
    if b"\0" in start[:4096]:
        raise LogError(f"{path}: a binary file of a kind that gradclip does not know.")
    return _guess_text(head)


def _guess_text(head: str) -> str:
    text = head.lstrip()
    lines = text.splitlines()
    if text[0] in "{[" and (first := parsed(lines[0])) is not None:
        if isinstance(first, dict) and "gradclip" in first:
            return "gradclip"
        # One object alone is a document; with others below, each is a step.
        if isinstance(first, dict) and len(lines) > 1:
            return "jsonl"
        return "json"
    # parsed() returns None for null as well as for what is no JSON.
    if len(lines) == 1 and (text.strip() == "null" or parsed(text) is not None):
        return "json"
    # What Python prints begins with a brace, too, but quotes its names singly.
    if text[0] in "{[" and text[1:].lstrip()[:1] in ("", '"', "{", "[", "]", "}"):
        return "json" if not _lines_of_json(lines) else "jsonl"
    table = tabular.delimiter_of(head) or tabular.is_heading(text)
    table = table or tabular.is_one_column(text)
    return "csv" if table else "console"


def _lines_of_json(lines: list[str]) -> bool:
    """Return whether a later line is an object by itself, the first being damaged."""
    whole = (isinstance(parsed(line), dict) for line in lines[1:4] if len(line) > 2)
    return any(whole)
