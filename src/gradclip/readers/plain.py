"""Logs that are no plain text file: a pipe, standard input, gzip, UTF-16.

A log is opened more than once, to guess its format and to read it, which takes from a
pipe what nobody gets back. So these are copied to a file that lasts as long as needed.
"""

import codecs
import gzip
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast

from gradclip.record import LogError

STDIN = "-"
GZIP = b"\x1f\x8b"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""What PowerShell's `>` begins a file with."""


@contextmanager
def plain_file(path: Path) -> Iterator[Path]:
    """Yield a log as a file that can be read again; files and folders are themselves.

    Raises:
        LogError: If what is packed is damaged; as any other, it names the log itself.
    """
    with ExitStack() as stack:
        copy = path
        try:
            if flows_away(path):
                copy = _copied(stack, _opened(stack, path), path.name)
            copy = _unpacked(stack, copy)
            yield copy
        except LogError as error:
            # Nobody knows the name of the copy.
            raise LogError(str(error).replace(str(copy), str(path))) from None


def flows_away(path: Path) -> bool:
    """Return whether what was read from it is gone, as from a pipe."""
    if str(path) == STDIN:
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _opened(stack: ExitStack, path: Path) -> BinaryIO:
    if str(path) == STDIN:
        return sys.stdin.buffer
    return stack.enter_context(path.open("rb"))


def _unpacked(stack: ExitStack, path: Path) -> Path:
    """Return a file without gzip around it, and in UTF-8."""
    start = _start(path)
    # By its first bytes, since a packed log need not be called .gz.
    if start == GZIP:
        try:
            with gzip.open(path) as stream:
                inside = cast(BinaryIO, stream)
                path = _copied(stack, inside, path.name.removesuffix(".gz"))
        except (OSError, EOFError, zlib.error) as error:
            raise LogError(f"{path}: not a whole gzip file: {error}") from None
        # What was packed may be UTF-16.
        start = _start(path)
    if start in UTF16:
        text = path.read_bytes().decode("utf-16", errors="replace")
        path = _place(stack, path.name)
        path.write_text(text, encoding="utf-8", newline="")
    return path


def _start(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(2)


def _copied(stack: ExitStack, stream: BinaryIO, name: str) -> Path:
    copy = _place(stack, name)
    with copy.open("wb") as file:
        shutil.copyfileobj(stream, file)
    return copy


def _place(stack: ExitStack, name: str) -> Path:
    """Return a place for a file of this name, which tells some formats."""
    return Path(stack.enter_context(TemporaryDirectory())) / name
