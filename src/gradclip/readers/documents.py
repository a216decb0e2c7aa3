"""JSON in its forms: Hugging Face's trainer state, lists, columns, lines, notebooks."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gradclip.readers.columns import Columns, parsed
from gradclip.record import LogError


def read_document(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        LogError: If it is damaged or cut off; the message names the line.
    """
    text = path.read_text("utf-8-sig", errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        ended = error.pos >= len(text.rstrip()) or "Unterminated" in error.msg
        cut = " The file seems to be cut off." if ended else ""
        raise LogError(f"{path}, line {error.lineno}: {error.msg}.{cut}") from None
    except RecursionError:
        raise LogError(f"{path}: nested too deeply for a log.") from None


def columns_of(document: Any, path: Path, column: str | None) -> tuple[Columns, str]:
    """Return the columns of a JSON document, and what it is.

    Raises:
        LogError: If it is neither a list of steps nor columns.
    """
    columns = Columns(column)
    # By what it holds, since trainer_state.json is often renamed.
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        _add_all(document["log_history"], columns)
        return columns, "Hugging Face trainer state"
    if isinstance(document, list):
        if document and not any(isinstance(x, dict) for x in document):
            raise LogError(
                f"{path}: a JSON list of {type(document[0]).__name__}, and not of "
                'steps such as {"step": 0, "grad_norm": 1.5}.'
            )
        _add_all(document, columns)
        return columns, "JSON list"
    lists = _lists(document)
    if not lists:
        names = ", ".join(document) if isinstance(document, dict) else ""
        held = names or json.dumps(document)
        raise LogError(
            f"{path}: JSON that holds no list of steps; it has {held[:200]}."
        )
    whole = max(map(len, lists.values()))
    for name, x in document.items():
        if isinstance(x, list) and name not in lists and "norm" in name:
            columns.notes.append(
                f"{name} has {len(x)} entries where others have {whole}, and was left "
                "out."
            )
    for values in zip(*lists.values(), strict=True):
        columns.add(dict(zip(lists, values, strict=True)))
    return columns, "JSON columns"


def _add_all(entries: Iterable[Any], columns: Columns) -> None:
    for entry in entries:
        if isinstance(entry, dict):
            columns.add(entry)


def _lists(document: Any) -> dict[str, list[Any]]:
    """Return the lists that are as long as the longest one."""
    if not isinstance(document, dict):
        return {}
    lists = {name: x for name, x in document.items() if isinstance(x, list)}
    # Shorter lists are settings, or have other steps, and fit no row.
    longest = max(map(len, lists.values()), default=0)
    return {name: x for name, x in lists.items() if len(x) == longest}


def read_lines(lines: Iterable[str], source: str, column: str | None) -> Columns:
    """Return the columns of JSON lines; damaged ones are left out and counted.

    Raises:
        LogError: If most lines are damaged.
    """
    columns, bad, total = Columns(column), [], 0
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        total += 1
        entry = parsed(line)
        if isinstance(entry, dict):
            columns.add(entry)
        else:
            bad.append(at)
    if len(bad) > total / 2:
        raise LogError(
            f"{source}, line {bad[0]}: no JSON, as are {len(bad)} of {total} lines."
        )
    if bad:
        columns.notes.append(
            f"{len(bad)} damaged lines were left out, the first is line {bad[0]}."
        )
    return columns


def _entries(document: Any, name: str) -> list[dict[str, Any]]:
    """Return the dictionaries in a list under a name, as far as there are any."""
    found = document.get(name) if isinstance(document, dict) else None
    return [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []


def notebook_lines(document: Any) -> Iterator[str]:
    """Yield the lines that a Jupyter notebook's cells printed."""
    for cell in _entries(document, "cells"):
        for output in _entries(cell, "outputs"):
            data = output.get("data")
            shown = data.get("text/plain") if isinstance(data, dict) else None
            text = output.get("text") or shown or ""
            whole = text if isinstance(text, str) else "".join(map(str, text))
            # Progress bars go back to the start of their line, as in a terminal.
            yield from whole.replace("\r", "\n").splitlines()
