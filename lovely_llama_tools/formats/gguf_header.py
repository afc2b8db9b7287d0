"""The header of a GGUF: a bounded scan for its fields and the places of its tensors, over all parts of a split file."""

import math
import os
import re
import struct
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lovely_llama import LlamaError, check

from ..extras import counted
from .model import open_file


class Kind(NamedTuple):
    """How a type of tensor is stored: in blocks of so many values, of so many bytes each."""

    name: str
    block: int
    width: int


# The types that are read, by their numbers: github.com/ggml-org/ggml, include/ggml.h and src/ggml-common.h.
KINDS = {
    0: Kind("F32", 1, 4), 1: Kind("F16", 1, 2), 30: Kind("BF16", 1, 2),
    2: Kind("Q4_0", 32, 18), 3: Kind("Q4_1", 32, 20), 6: Kind("Q5_0", 32, 22), 7: Kind("Q5_1", 32, 24),
    8: Kind("Q8_0", 32, 34), 10: Kind("Q2_K", 256, 84), 11: Kind("Q3_K", 256, 110),
    12: Kind("Q4_K", 256, 144), 13: Kind("Q5_K", 256, 176), 14: Kind("Q6_K", 256, 210),
    20: Kind("IQ4_NL", 32, 18), 21: Kind("IQ3_S", 256, 110), 23: Kind("IQ4_XS", 256, 136),
    34: Kind("TQ1_0", 256, 54), 35: Kind("TQ2_0", 256, 66),
}  # fmt: skip
# The others by name; those without one have been given up.
UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


class Stored(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    kind: str
    file: BinaryIO
    begin: int
    size: int  # in bytes


# The types of fields as `struct` has them; for a string, its length.
CODES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 8), "BbHhIif?QqdQ", strict=True))
FLOAT32, STRING, ARRAY = 6, 8, 9
TEXT, COUNT = 2**25, 2**16  # bytes of all names and strings in a file; fields, and tensors


class Scan:
    """A file read forwards. Every size is compared with what is left of the file before memory is taken for it."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.at, self.text = file, path, 0, TEXT
        self.size = os.fstat(file.fileno()).st_size

    def take(self, n: int) -> bytes:
        data = self.file.read(n) if n <= self.size - self.at else self.beyond(n)
        self.at += n
        return data

    def beyond(self, n: int) -> bytes:
        """Refuse to read so much."""
        check("strings", f"over {TEXT} bytes", n > self.size - self.at, "less text in a header", self.path)
        raise LlamaError(self.path, "size", counted(self.size, "byte"), f"{n} more at byte {self.at}")

    def numbers(self, code: str, n: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{n}{code}", self.take(n * struct.calcsize(f"<{code}")))

    def strings(self, n: int) -> list[str]:
        """So many strings, each after its length. One loop, since vocabularies have many."""
        found, begin, read = list[str](), self.at, self.file.read
        end = min(self.size, begin + self.text)
        if 8 * n > end - begin:
            self.beyond(8 * n)
        try:
            for _ in range(n):
                length = int.from_bytes(read(8), "little")
                self.at += 8
                found.append((read(length) if length <= end - self.at else self.beyond(length)).decode())
                self.at += length
        except UnicodeDecodeError as error:
            raise LlamaError(self.path, "string", f"other bytes at byte {self.at}", "UTF-8") from error
        self.text -= self.at - begin
        return found

    def value(self, name: str) -> Any:
        """A number, a string, a list of strings, or a view of numbers, which take as much memory as in the file."""
        (kind,), n = self.numbers("I"), 1
        if array := kind == ARRAY:
            kind, n = *self.numbers("I"), *self.numbers("Q")
        check(name, f"type {kind}", kind in CODES, "a number, a string or an array of these", self.path)
        fits = n * struct.calcsize(f"<{CODES[kind]}") <= self.size - self.at
        check(name, counted(n, "value"), fits, "no more than fit into the file", self.path)
        if array and kind != STRING:
            view: Any = memoryview(self.take(n * struct.calcsize(f"<{CODES[kind]}")))
            return view.cast(CODES[kind])
        values: Any = self.strings(n) if kind == STRING else self.numbers(CODES[kind])
        if array:
            return values
        return shortest(values[0]) if kind == FLOAT32 else values[0]


def shortest(x: float) -> float:
    """The number with the fewest decimals among those that round to the same float32: 1e-05, not 9.99999974738e-06."""
    return float(str(np.float32(x)))


def scan_gguf(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The fields and tensors of one file.

    github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3. Shapes are stored last axis first, and reversed here.
    """
    must, scan = partial(check, file=path), Scan(file, path)
    must("magic", magic := scan.take(4), magic == b"GGUF", b"GGUF")
    must("version", version := scan.numbers("I")[0], version in (2, 3), "2 or 3, little-endian")
    n_tensors, n_fields = scan.numbers("Q", 2)
    fits = 32 * n_tensors + 13 * n_fields <= scan.size and max(n_tensors, n_fields) <= COUNT
    must("counts", (n_tensors, n_fields), fits, f"no more than fit into the file, and {COUNT}")
    fields, found = dict[str, Any](), dict[str, tuple[tuple[int, ...], int, int]]()
    for _ in range(n_fields):
        (name,) = scan.strings(1)
        must(name, "two values", name not in fields, "one")
        fields[name] = scan.value(name)
    for _ in range(n_tensors):
        (name,), (axes,) = scan.strings(1), scan.numbers("I")
        must(name, f"{axes} axes", 1 <= axes <= 4, "1 to 4")
        must(name, "two tensors", name not in found, "one")
        found[name] = scan.numbers("Q", axes)[::-1], *scan.numbers("I"), *scan.numbers("Q")
    alignment = fields.get("general.alignment", 32)
    fits = type(alignment) is int and 8 <= alignment <= 2**16 and alignment % 8 == 0
    must("general.alignment", alignment, fits, "a multiple of 8, at most 65536")
    data, tensors = -(-scan.at // alignment) * alignment, dict[str, Stored]()
    for name, (shape, number, offset) in found.items():
        known = f"{number}, {UNREAD[number]}" if number in UNREAD else number
        must(name, f"unsupported type {known}", number in KINDS, ", ".join(kind.name for kind in KINDS.values()))
        kind, begin = KINDS[number], data + offset
        must(name, f"offset {offset}", offset % alignment == 0, f"a multiple of {alignment}")
        must(name, f"rows of {shape[-1]}", shape[-1] % kind.block == 0, f"a multiple of {kind.block}, as {kind.name}")
        size = math.prod(shape) // kind.block * kind.width
        must(name, f"bytes {begin} to {begin + size}", begin + size <= scan.size, f"an end within {scan.size}")
        tensors[name] = Stored(shape, kind.name, file, begin, size)
    places = sorted((tensor.begin, tensor.begin + tensor.size) for tensor in tensors.values())
    must("tensors", "two that overlap", all(a <= b for (_, a), (b, _) in pairwise(places)), "each in its own place")
    return fields, tensors


def read_header(path: Path, files: ExitStack) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The fields and tensors of a GGUF: of all parts where its name is that of one, as NAME-00001-of-00003.gguf.

    Parts are those that llama.cpp's gguf-split writes: files of the same name in the same folder, each with its number,
    from 0 on, and with the number of all parts and of all tensors. The first has the other fields.
    """
    name, parts = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", path.name, re.DOTALL), [path]
    if name:
        count = int(name[3])
        check("path", f"part {int(name[2])} of {count}", 1 <= int(name[2]) <= count, f"one from 1 to {count}", path)
        parts = [path.with_name(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    fields, tensors = dict[str, Any](), dict[str, Stored]()
    for i, part in enumerate(parts):
        file = files.enter_context(open_file(part, None if part == path else path.parent))
        more_fields, more_tensors = scan_gguf(file, part)
        for field, want in {"split.no": (0, i), "split.count": (1, len(parts))}.items():
            got = more_fields.get(field, want[0])
            check(field, got, got == want[1], f"{want[1]}, by the name of the file", part)
        for field, value in more_fields.items():
            first = fields.setdefault(field, value)
            same = field == "split.no" or first is value or first == value
            check(field, value, same, "the value in the first part", part)
        twice = [name for name in more_tensors if name in tensors]
        check("tensors", f"{', '.join(twice[:3])} again", not twice, "each in one part", part)
        tensors |= more_tensors
    total = fields.get("split.tensors.count", len(tensors))
    check("split.tensors.count", total, total == len(tensors), f"{len(tensors)}, those in all parts", path)
    return fields, tensors
