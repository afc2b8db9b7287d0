"""Reading what another program recorded: tokens and logits, as npz, safetensors or JSON lines, told by its contents."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lovely_llama import LlamaError, check

from ..formats.model import open_file
from ..formats.safetensors import KINDS, WHOLE, read_tensor, scan_safetensors

SHOWN = "a file with tokens and logits: npz, safetensors, or JSON lines"


class Recorded(NamedTuple):
    """What a program was given and gave."""

    tokens: Any
    logits: Any


def read_theirs(path: Path) -> Recorded:
    """Tokens and logits out of a file. Nothing in it is executed."""
    with open_file(path) as file:
        head = file.read(10)
        file.seek(0)
        if head[:2] == b"PK":
            arrays = read_npz(file, path)
        elif head[8:10] in (b'{"', b"{ "):
            places = scan_safetensors(file, path, KINDS | WHOLE)
            arrays = {name: read_tensor(file, path, name, places[name]) for name in Recorded._fields if name in places}
        else:
            arrays = read_lines(path, file.read())
    for name in Recorded._fields:
        check(name, "none", name in arrays, SHOWN, path)
    tokens, logits = (np.squeeze(arrays[name]) if np.ndim(arrays[name]) > wanted else arrays[name]
                      for name, wanted in (("tokens", 1), ("logits", 2)))  # fmt: skip
    return Recorded(tokens, logits)


def read_npz(file: BinaryIO, path: Path) -> Mapping[str, Any]:
    """The arrays of a zip file of numpy's."""
    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in Recorded._fields if name in found}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise LlamaError(path, "contents", "a zip file that numpy does not read without pickles", SHOWN) from error


def read_lines(path: Path, data: bytes) -> Mapping[str, Any]:
    """Lines with an object each: of all tokens and rows, or of a token and the row after it."""
    tokens, rows = list[Any](), list[Any]()
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LlamaError(path, f"line {number}", "no JSON", SHOWN) from error
        check(f"line {number}", "no object", isinstance(found, dict), SHOWN, path)
        for name in Recorded._fields:
            check(name, f"none in line {number}", name in found, SHOWN, path)
        whole = isinstance(found["tokens"], list)
        check(f"line {number}", "another prompt", not (whole and tokens), "one prompt", path)
        tokens += found["tokens"] if whole else [found["tokens"]]
        rows += found["logits"] if whole else [found["logits"]]
    try:
        return {"tokens": np.array(tokens), "logits": np.array(rows, np.float64)} if rows else {}
    except (ValueError, TypeError) as error:
        raise LlamaError(path, "logits", "rows of different lengths, or no numbers", "one number a token") from error
