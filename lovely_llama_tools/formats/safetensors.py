"""safetensors: tensors in one file behind a header in JSON, which is checked in full before any is read."""

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float, Shaped

from lovely_llama import check, is_whole

from ..extras import counted
from ..strict_json import read_json, to_json
from .model import Tensor, read_at

KINDS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
WHOLE = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8"), "F64": np.dtype("<f8")}  # which no weights are in
HEADER = 2**21  # bytes; those of a Llama of a thousand layers need half of that


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    shape: tuple[int, ...]
    dtype: str
    begin: int


def scan_safetensors(file: BinaryIO, path: Path, kinds: Mapping[str, Any] = KINDS) -> dict[str, Place]:
    """The places of all tensors, each of one of the kinds. They fill the file: none overlaps another, or leaves a gap.

    huggingface.co/docs/safetensors: the header's length as uint64, the header, the tensors. All is little-endian.
    """
    must, size = partial(check, file=path), os.fstat(file.fileno()).st_size
    what = "weights" if kinds is KINDS else "numbers"
    must("size", counted(size, "byte"), size >= 8, "at least 8")
    length = int.from_bytes(file.read(8), "little")
    must("header", counted(length, "byte"), length <= min(HEADER, size - 8), f"at most {min(HEADER, size - 8)}")
    header, at = read_json(file.read(length), path), 8 + length
    header.pop("__metadata__", None)
    places, ends = dict[str, Place](), [(at, at)]
    for name, entry in header.items():
        fields = cast(dict[str, Any], entry if isinstance(entry, dict) else {})
        must(name, f"{entry!s:.60}", fields.keys() == {"dtype", "shape", "data_offsets"}, "dtype, shape, data_offsets")
        kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        must(name, f"{kind!s:.60}", kind in [*kinds], f"{what} in {', '.join(kinds)}")
        must(name, f"the shape {shape!s:.60}", are_sizes(shape) and len(shape) <= 4, "up to four whole numbers")
        must(name, f"the offsets {offsets!s:.60}", are_sizes(offsets) and len(offsets) == 2, "two whole numbers")
        begin, end = (at + offset for offset in offsets)
        need = kinds[kind].itemsize * math.prod(shape)
        must(name, counted(end - begin, "byte"), end - begin == need, f"{need}, for {kind} of shape {tuple(shape)}")
        places[name] = Place(tuple(shape), kind, begin)
        ends.append((begin, end))
    ends.sort()
    for (_, last), (begin, _) in pairwise(ends):
        must("data_offsets", f"a tensor that begins at byte {begin}", begin == last, f"byte {last}: no gap, no overlap")
    must("size", counted(size, "byte"), size == ends[-1][1], ends[-1][1])
    return places


def are_sizes(values: Any) -> bool:
    """Whether this is a list of whole numbers, none below 0."""
    return isinstance(values, list) and all(is_whole(n) and n >= 0 for n in cast(list[Any], values))


def read_tensor(file: BinaryIO, path: Path, name: str, place: Place) -> Shaped[np.ndarray, "..."]:
    """One tensor, as it is stored."""
    kind = (KINDS | WHOLE)[place.dtype]
    return read_at(file, path, name, place.begin, kind, math.prod(place.shape)).reshape(place.shape)


def write_safetensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, get: Callable[[str], Float[np.ndarray, "..."]]
) -> None:
    """Write tensors of one dtype, one at a time in memory; the package safetensors needs all of them at once."""
    write_tensors(path, {name: Tensor(shape, dtype) for name, shape in shapes.items()}, get)


def write_arrays(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Write arrays as they are: of floating-point numbers, or of whole ones in int32."""
    kinds = {dtype: kind for kind, dtype in (KINDS | WHOLE).items()}
    write_tensors(path, {name: Tensor(array.shape, kinds[array.dtype]) for name, array in arrays.items()}, arrays.get)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], get: Callable[[str], Any]) -> None:
    """Write the header, then each tensor when its turn comes."""
    header, at = dict[str, Any](__metadata__={"format": "pt"}), 0  # without which transformers reads none of it
    for name, (shape, dtype) in tensors.items():
        end = at + (KINDS | WHOLE)[dtype].itemsize * math.prod(shape)
        header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": (at, end)}, end
    text = to_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            file.write(np.ascontiguousarray(get(name)).reshape(-1).view(np.uint8).data)
