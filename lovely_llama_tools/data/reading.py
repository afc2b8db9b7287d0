"""Reading files in blocks."""

import codecs
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from lovely_llama import LlamaError, check

from ..formats.model import open_file
from ..tokens.parts import BLOCK


def read_with(path: Path, read: Callable[[BinaryIO], bytes]) -> Iterator[bytes]:
    """The bytes of a file, as many at a time as `read` takes."""
    with open_file(path, text=True) as file:
        try:
            while data := read(file):
                yield data
        except OSError as error:
            raise LlamaError(path, "path", error.strerror, "a file that can be read") from error


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file, in blocks of about `BLOCK` bytes, up to the end of a line where it is not far.

    A byte order mark at its beginning is no part of it.
    """
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    for data in chain(read_with(path, lambda file: file.read(BLOCK) + file.readline(BLOCK)), [b""]):
        begun = len(decoder.getstate()[0])  # bytes of a character that the last block has not ended
        try:
            text = decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            got = f"bytes that are not UTF-8 at byte {read - begun + error.start}"
            raise LlamaError(path, "text", got, "UTF-8") from error
        yield text.removeprefix("\ufeff") if not read else text
        read += len(data)


def read_text(path: str) -> str:
    """The text of a file, or of stdin for -."""
    if path != "-":
        return "".join(read_blocks(Path(path)))
    check("stdin", "a closed one", sys.stdin is not None, "a text, or a file")  # pyright: ignore[reportUnnecessaryComparison]
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise LlamaError("stdin", "text", f"bytes that are not UTF-8 at byte {error.start}", "UTF-8") from error
