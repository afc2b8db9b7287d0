"""Files of token ids: raw little-endian integers, written once, checked on opening, and read in pieces."""

import hashlib
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from lovely_llama import LlamaError, check

from ..extras import counted, progress
from ..formats.files import publish
from ..formats.model import open_file

BLOCK = 2**20  # ids checked at a time


def id_dtype(vocab: int) -> str:
    """The narrower of the two dtypes that nanoGPT and llama2.c use, if it can hold all ids."""
    return "uint16" if vocab <= 2**16 else "uint32"


class Writer:
    """Writes a file of integers atomically: it gets its name from `publish`."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.count, self.digest = path, np.dtype(dtype).newbyteorder("<"), 0, hashlib.sha256()
        for abandoned in path.parent.glob(f".{path.name}.part*"):  # left by a killed process
            abandoned.unlink()
        self.part = path.with_name(f".{path.name}.part{os.getpid()}")
        self.file = self.part.open("wb")

    def add(self, ids: Sequence[int] | Integer[np.ndarray, " seq"]) -> None:
        """Append ids."""
        data = np.asarray(ids, self.dtype).tobytes()
        self.digest.update(data)
        self.file.write(data)
        self.count += len(ids)

    def publish(self) -> None:
        """Flush the file to disk, then give it its name."""
        self.file.close()
        publish(self.part, self.path)

    def discard(self) -> None:
        """Delete the file, unless it has been published."""
        self.part.unlink(missing_ok=True)
        with suppress(OSError):  # of a full disk, once more
            self.file.close()


class Part(NamedTuple):
    """An open file of ids."""

    file: Path
    number: int  # file descriptor
    dtype: Any
    offset: int  # in bytes, of the first id
    size: int  # in ids
    state: tuple[int, int, int]  # see `state_of`


class Tokens:
    """The ids of several files as one sequence.

    They are read with `pread`: a file truncated meanwhile raises an exception, where a memory map would crash the
    process.
    """

    def __init__(self, parts: Sequence[Part], vocab: int) -> None:
        self.parts, self.vocab = parts, vocab
        self.ends: list[int] = np.cumsum([part.size for part in parts]).tolist()
        self.count = self.ends[-1]
        for part in parts:
            weakref.finalize(self, os.close, part.number)

    def read(self, start: int, size: int) -> Int[np.ndarray, " seq"]:
        """`size` ids from `start`, as int32."""
        found = list[Any]()
        while size > 0:
            i = bisect_right(self.ends, start)
            part, at = self.parts[i], start - self.ends[i] + self.parts[i].size
            ids = read_part(part, at, min(size, part.size - at), self.vocab)
            found.append(ids)
            start, size = start + len(ids), size - len(ids)
        return (found[0] if len(found) == 1 else np.concatenate(found)).astype(np.int32)

    def blocks(self) -> Iterator[tuple[int, Int[np.ndarray, " seq"]]]:
        """All ids in blocks, each with the position of its first."""
        return ((at, self.read(at, min(BLOCK, self.count - at))) for at in range(0, self.count, BLOCK))

    def digest(self) -> str:
        """The SHA-256 of all ids as stored. Checks every id."""
        digest = hashlib.sha256()
        with progress("checking tokens", self.count) as advance:
            for part in self.parts:
                for at in range(0, part.size, BLOCK):
                    ids = read_part(part, at, min(BLOCK, part.size - at), self.vocab)
                    digest.update(ids.tobytes())
                    advance(len(ids))
        return digest.hexdigest()


def read_part(part: Part, at: int, size: int, vocab: int) -> Integer[np.ndarray, " seq"]:
    """Read and check ids, in their own dtype, since a conversion could wrap a wrong id into the valid range."""
    width = part.dtype.itemsize
    where = part.offset + at * width
    try:
        state, data = state_of(part.number), os.pread(part.number, size * width, where)
    except OSError as error:
        raise LlamaError(part.file, "path", error.strerror, "a file that can be read") from error
    got, wanted = f"{counted(state[0], 'byte')}, changed since it was opened", f"{part.state[0]}, unchanged"
    check("size", got, state == part.state, wanted, part.file)
    check("size", f"no more at byte {where + len(data)}", len(data) == size * width, "as when opened", part.file)
    ids = np.frombuffer(data, part.dtype)
    if ids.max() >= vocab or ids.min() < 0:
        wrong = int(np.flatnonzero((ids >= vocab) | (ids < 0))[0])
        got = f"{ids[wrong]} at byte {where + wrong * width}"
        raise LlamaError(part.file, "tokens", got, f"ids from 0 to {vocab - 1}")
    return ids


def state_of(number: int) -> tuple[int, int, int]:
    """The size of an open file, and the times of the last change of its contents and of its metadata."""
    stat = os.fstat(number)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def open_tokens(paths: Sequence[Path], dtype: str, vocab: int) -> Tokens:
    """The ids of these files. Where one is refused, none stays open."""
    parts = list[Part]()
    with ExitStack() as opened:
        for path in paths:
            parts.append(open_part(path, dtype))
            opened.callback(os.close, parts[-1].number)
        opened.pop_all()
    return Tokens(parts, vocab)


def open_part(path: Path, dtype: str) -> Part:
    """Open a file of ids: raw ids of this dtype, or a .npy, which states its own."""
    with open_file(path) as file:
        kind, offset = npy_header(file, path) if path.suffix == ".npy" else (np.dtype(dtype).newbyteorder("<"), 0)
        number = os.dup(file.fileno())
    state = state_of(number)
    size, width = state[0] - offset, kind.itemsize
    try:
        check("size", f"{state[0]} bytes", size > 0, "at least one id", path)
        said = f"{counted(size, 'byte')} of ids"
        check("size", said, size % width == 0, f"a multiple of {width}, for {kind.name}", path)
        head = np.frombuffer(os.pread(number, min(size, 2**16), offset), kind)
        wider = width == 2 and len(head) >= 16 and not head[1::2].any()
        check("dtype", "a zero after every id, as in wider ones", not wider, f"{kind.name}, or a .npy", path)
    except LlamaError:
        os.close(number)
        raise
    return Part(path, number, kind, offset, size // width, state)


def npy_header(file: BinaryIO, path: Path) -> tuple[Any, int]:
    """The dtype of a .npy file, and the offset of its data."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, OSError) as error:
        raise LlamaError(path, "contents", "no header of numpy's", "a .npy, version 1 or 2") from error
    axes = f"{len(shape)} axes" if len(shape) != 1 else "one axis"
    check("dtype", f"{dtype} with {axes}", dtype.kind in "iu" and len(shape) == 1, "integers in a row", path)
    left = os.fstat(file.fileno()).st_size - file.tell()
    need = shape[0] * dtype.itemsize
    check("size", f"{counted(left, 'byte')} of ids", left == need, f"{need}, as its header says", path)
    return dtype, file.tell()
