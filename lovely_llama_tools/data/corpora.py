"""Finding the files of a corpus, and reading their texts in blocks."""

import codecs
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from lovely_llama import LlamaError, check

from ..formats.model import open_file
from ..strict_json import read_value
from ..tokens import Tokenizer
from ..tokens.base import LARGEST
from ..tokens.parts import BLOCK, divide, places

TEXTS, TOKENS = (".txt", ".jsonl"), (".bin", ".npy")  # suffixes looked for in folders
IDS, DESCRIPTION = "tokens.bin", "data.json"  # files of a folder that `prepare` wrote
STANDARD_LIBRARY = 2**22  # bytes of its source code used as a corpus


# What operating systems and editors leave in folders: hidden files, backups, thumbnails, recovered fragments.
LITTER = (".*", "*~", "#*#", "Thumbs.db", "desktop.ini", "__MACOSX", "lost+found", "@eaDir")


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name was left by an operating system or an editor."""
    return any(fnmatchcase(name, pattern) for pattern in LITTER)


def corpus_files(paths: Sequence[str], suffixes: Sequence[str] = (*TEXTS, *TOKENS)) -> list[Path]:
    """The files at these paths; in folders, all with known suffixes, sorted, token files only if there are no texts.

    Hidden files and other litter of a folder are left out. Without paths: the source code of Python's standard library.
    """
    found = list[Path]()
    for path in map(Path, paths):
        check("path", "a NUL character", "\0" not in str(path), "a name without", path)
        try:
            if not path.is_dir():
                found.append(path)
                continue
            inside = sorted(file for file in path.rglob("*") if file.suffix in suffixes)
            inside = [file for file in inside if not any(map(is_litter, file.relative_to(path).parts))]
            inside = [path / IDS] if (path / DESCRIPTION).exists() and path / IDS in inside else inside
        except OSError as error:
            raise LlamaError(path, "path", error.strerror, "a folder that can be read") from error
        check("path", "no files", bool(inside), f"files named *{' or *'.join(suffixes)}", path)
        found += [file for file in inside if file.suffix not in TOKENS] or inside
    return found or standard_library()


def standard_library() -> list[Path]:
    """ASCII modules of Python's standard library, sorted, up to `STANDARD_LIBRARY` bytes."""
    root, found, size = Path(sysconfig.get_paths()["stdlib"]), list[Path](), 0
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & {*path.parts[len(root.parts) :]}:
            continue
        text = path.read_bytes()
        if text.isascii() and size + len(text) <= STANDARD_LIBRARY:
            found.append(path)
            size += len(text)
    check("path", f"{size} bytes of source", size > 0, "Python's own modules, or the name of a corpus", root)
    return found


def read_with(path: Path, read: Callable[[BinaryIO], bytes]) -> Iterator[bytes]:
    """The bytes of a file, as many at a time as `read` takes."""
    with open_file(path) as file:
        try:
            while data := read(file):
                yield data
        except OSError as error:
            raise LlamaError(path, "path", error.strerror, "a file that can be read") from error


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file, in blocks of about `BLOCK` bytes, up to the end of a line where it is not far."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    for data in chain(read_with(path, lambda file: file.read(BLOCK) + file.readline(BLOCK)), [b""]):
        begun = len(decoder.getstate()[0])  # bytes of a character that the last block has not ended
        try:
            yield decoder.decode(data, not data)
        except UnicodeDecodeError as error:
            got = f"bytes that are not UTF-8 at byte {read - begun + error.start}"
            raise LlamaError(path, "text", got, "UTF-8") from error
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


def read_documents(path: Path, separators: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The documents of a text, split at separators, in parts, each with whether its document ends there.

    A separator includes a newline on either side of it. Long documents are divided where the tokens stay the same.
    """
    mark = "\n?(?:" + ("|".join(map(re.escape, separators)) or "(?!)") + ")"
    surely, close = re.compile(rf"{mark}(?:\n|(?=[^\n]))"), 1 + max(map(len, separators), default=0)
    rest, at = "", places(tokenizer)
    for block in read_blocks(path):
        *parts, rest = surely.split(rest + block)
        yield from ((part, True) for part in parts)
        if len(rest) >= BLOCK:
            end = divide(tokenizer, rest[:-close], at)  # what is close to the end may be a separator
            if end:
                yield rest[:end], False
                rest = rest[end:]
    *parts, rest = re.split(f"{mark}\n?", rest)
    yield from ((part, True) for part in (*parts, rest))


def is_records(path: Path) -> bool:
    """Whether a file holds JSON lines, by its suffix."""
    return path.suffix == ".jsonl"


def read_records(path: Path) -> Iterator[tuple[str, str | list[dict[str, Any]]]]:
    """The records of a JSON lines file, each with its file and line: a text, or the messages of a conversation."""
    for number, line in enumerate(read_with(path, lambda file: file.readline(LARGEST + 1)), 1):
        where = f"{path}:{number}"
        check("line", f"more than {LARGEST} bytes", len(line) <= LARGEST, "shorter records", where)
        if not line.strip():
            continue
        value = read_value(line.rstrip(), where, lines=True)
        right = isinstance(value, dict | list)
        check("JSON", f"a value of type {type(value).__name__}", right, "an object or a list", where)
        record: dict[str, Any] = {"messages": value} if isinstance(value, list) else value
        if isinstance(text := record.get("text"), str) and "messages" not in record:
            yield where, text
        else:
            yield where, as_messages(record.get("messages"), where)


def as_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Check that a value is a list of messages, each with a role and a content."""
    expected = 'messages, each with a "role" and a "content", or a "text"'
    check("messages", f"a value of type {type(value).__name__}", isinstance(value, list), expected, where)
    check("messages", "none", bool(value), expected, where)
    for message in value:
        check("messages", f"{message!r:.40}", isinstance(message, dict), expected, where)
        for key in ("role", "content"):
            check(
                "messages", f"{message.get(key)!r:.40} as the {key}", isinstance(message.get(key), str), expected, where
            )
    return value


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of all files, in blocks; of JSON lines, the texts and messages without their keys."""
    for path in paths:
        if not is_records(path):
            yield from read_blocks(path)
            continue
        for _, record in read_records(path):
            yield record if isinstance(record, str) else "\n".join(message["content"] for message in record)
