"""What another program recorded: tokens, logits and activations, out of a file or a folder told by its contents."""

import json
import os
import warnings
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from jax import numpy as jnp

from lovely_llama import LlamaError, check

from ...formats.model import open_file, read_at
from ...formats.safetensors import KINDS, WHOLE, scan_safetensors
from ...tokens.base import contained
from .dumps import read_folder, read_torch

SHOWN = "tokens, and logits or activations, in npz, safetensors, JSON lines, a file of torch.save, or a folder of such"
# The names under which programs record the two, the likeliest first.
NAMES = {
    "tokens": ("tokens", "input_ids", "ids"),
    "logits": (
        "logits", "lm_head", "model.lm_head", "output", "result_output", "unembed",
        "logits_processor", "logits_processor.next_token_logits", "output.next_token_logits",  # SGLang's
    ),
}  # fmt: skip
# What safetensors may hold besides: of these only whole numbers are read, as tokens.
OTHERS = {"BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "U64": "<u8"}
DTYPES = KINDS | WHOLE | {name: np.dtype(kind) for name, kind in OTHERS.items()}


class Recorded(NamedTuple):
    """What a program was given and gave."""

    tokens: Any  # ids of one prompt
    logits: Any | None  # (seq, vocab), or rows of its last tokens; None if only activations were recorded
    activations: Mapping[str, Any]  # all other arrays of floating-point numbers, by the names they were recorded under
    log_probabilities: bool = False  # logits are log-probabilities, NaN where the server returned none


def read_theirs(path: Path) -> Recorded:
    """A recording. Nothing in it is executed."""
    return recorded(read_folder(path, read_arrays) if os.path.isdir(path) else read_arrays(path), path)


def recorded(arrays: Mapping[str, Any], path: Path) -> Recorded:
    """Arrays by name, sorted into tokens, logits and activations."""
    used = {field: next((name for name in names if name in arrays), None) for field, names in NAMES.items()}
    check("tokens", "none", used["tokens"] is not None, SHOWN, path)
    others = {name: array for name, array in arrays.items() if name not in used.values() and is_floating(array)}
    check("logits", "none", used["logits"] is not None or bool(others), SHOWN, path)
    logits = None if used["logits"] is None else squeezed(arrays[used["logits"]], 2)
    return Recorded(squeezed(arrays[used["tokens"] or ""], 1), logits, others)


def is_floating(array: Any) -> bool:
    """Whether these are floating-point numbers, bfloat16 among them."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def squeezed(array: Any, axes: int) -> Any:
    """The array without axes of size 1, the first ones first, until so many are left."""
    while array.ndim > axes and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    return array


# ---- Files -----------------------------------------------------------------------------------------------------------


def read_arrays(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """The arrays in a file by name. One that belongs to a folder must be inside it."""
    with open_file(path, folder) as file:
        head = file.read(10)
        file.seek(0)
        if head[:4] in (b"PK\3\4", b"PK\5\6"):
            return read_zip(file, path)
        if head[:6] == b"\x93NUMPY":
            with numpy_s(path, "an array"):
                return {path.stem: np.load(file, allow_pickle=False)}
        if head[8:10] in (b'{"', b"{ ", b"{}"):
            return read_safetensors(file, path)
        return read_torch(file, path) if head[:1] == b"\x80" else read_lines(path, file.read())


def read_zip(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The arrays in a zip file of numpy's or torch's. Pickled Python objects among numpy's are left out."""
    with numpy_s(path, "a zip file"), zipfile.ZipFile(file) as archive:
        is_torch_s = any(name.endswith("/data.pkl") for name in archive.namelist())
    file.seek(0)
    if is_torch_s:
        return read_torch(file, path)
    arrays = dict[str, Any]()
    with numpy_s(path, "a zip file"), np.load(file, allow_pickle=False) as found:
        for name in found.files:
            try:
                arrays[name] = np.asarray(found[name])
            except ValueError:
                check(name, "Python objects", name not in NAMES, "numbers", path)
    return arrays


@contextmanager
def numpy_s(path: Path, what: str) -> Generator[None]:
    """Whatever numpy raises or warns of within, of which there are many kinds, is one line."""
    got = f"{what} that numpy does not read without pickles"
    with contained(path, "contents", got, SHOWN), warnings.catch_warnings(action="ignore"):
        yield


def read_safetensors(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The tensors in a file of safetensors."""
    places = scan_safetensors(file, path, DTYPES)
    return {
        name: read_at(file, path, name, begin, DTYPES[kind], int(np.prod(shape, dtype=np.int64))).reshape(shape)
        for name, (shape, kind, begin) in places.items()
        if kind != "BOOL"
    }


def read_lines(path: Path, data: bytes) -> dict[str, Any]:
    """Lines with an object each: of all tokens and rows, and of activations; or of a token and the row after it."""
    tokens, rows, others = list[Any](), list[Any](), dict[str, Any]()
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LlamaError(path, f"line {number}", "no JSON", SHOWN) from error
        check(f"line {number}", "no object", isinstance(found, dict), SHOWN, path)
        used = {field: next((name for name in names if name in found), "") for field, names in NAMES.items()}
        check("tokens", f"none in line {number}", bool(used["tokens"]), SHOWN, path)
        whole = isinstance(found[used["tokens"]], list)
        check(f"line {number}", "another prompt", not (whole and tokens), "one prompt", path)
        if whole:
            named = {name: numbers(value) for name, value in cast(dict[str, Any], found).items()}
            others = {name: array for name, array in named.items() if array is not None and name not in used.values()}
        check("logits", f"none in line {number}", bool(used["logits"] or others), SHOWN, path)
        listed = isinstance(found.get(used["logits"], []), list)
        check("logits", f"no list in line {number}", listed, "one number a token", path)
        tokens += found[used["tokens"]] if whole else [found[used["tokens"]]]
        if used["logits"]:
            rows += found[used["logits"]] if whole else [found[used["logits"]]]
    try:
        arrays = {"tokens": np.array(tokens)} | ({"logits": np.array(rows, np.float64)} if rows else {})
    except (ValueError, TypeError, OverflowError) as error:
        raise LlamaError(path, "logits", "rows of different lengths, or no numbers", "one number a token") from error
    return others | arrays if tokens else {}


def numbers(value: Any) -> Any:
    """A list of floating-point numbers as an array; None for anything else."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # rows of different lengths, for one
        return None
    return array if array.ndim and array.dtype.kind == "f" else None
