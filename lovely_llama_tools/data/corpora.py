"""Finding the files of a corpus, and reading their texts in blocks."""

import re
import sysconfig
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lovely_llama import LlamaError, check

from ..formats.model import open_file
from ..tokens import Tokenizer
from ..tokens.parts import BLOCK, divide, places
from .reading import read_blocks
from .records import is_array, is_records, read_records, texts_of

TEXTS, TOKENS = (".txt", ".jsonl", ".ndjson", ".json"), (".bin", ".npy")  # suffixes looked for in folders
# Tables, by suffix or first bytes, and how pandas reads them.
TABLES = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet", ".xlsx": "read_excel"}
PARQUET = b"PAR1"
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
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            inside = [file for file in inside if not any(map(is_litter, file.relative_to(path).parts))]
            inside = [
                file for file in inside if file.suffix.lower() != ".json" or is_array(file)
            ]  # others are settings
            inside = [path / IDS] if (path / DESCRIPTION).exists() and path / IDS in inside else inside
        except OSError as error:
            raise LlamaError(path, "path", error.strerror, "a folder that can be read") from error
        check("path", "no files", bool(inside), f"files named *{' or *'.join(suffixes)}", path)
        found += [file for file in inside if file.suffix.lower() not in TOKENS] or inside
    for path in found:
        check_no_table(path)
    return found or standard_library()


def check_no_table(path: Path) -> None:
    """Refuse a table, whose columns might be anything."""
    suffix = path.suffix.lower()
    if suffix not in (*TABLES, *TEXTS, *TOKENS):
        with open_file(path, text=True) as file:
            suffix = ".parquet" if file.read(len(PARQUET)) == PARQUET else suffix
    how = f'JSON lines: pandas.{TABLES.get(suffix)}({path.name!r}).to_json("rows.jsonl", orient="records", lines=True)'
    check("path", f"a table ({suffix})", suffix not in TABLES, how, path)


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


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """The texts of all files, in blocks; of rows of JSON, the texts and messages without their keys."""
    for path in paths:
        if not is_records(path):
            yield from read_blocks(path)
            continue
        for _, record in read_records(path):
            yield "\n".join(texts_of(record))
