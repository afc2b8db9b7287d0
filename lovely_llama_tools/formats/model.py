"""Checkpoint formats, one module each: a file or a folder in, a `Checkpoint` out. Here is what they share."""

import hashlib
import math
import mmap
import os
import re
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lovely_llama import Config, LlamaError, Params, Sampling, check, count, shapes

from ..devices.mesh import shardings
from ..extras import counted, progress
from ..tokens import Tokenizer
from ..tokens.base import open_file as open_file
from .layout import Layout, all_tensors, from_named

DTYPES = {"float32": jnp.float32, "float16": jnp.float16, "bfloat16": jnp.bfloat16}
THREADS = min(4, os.cpu_count() or 1)  # tensors that are read at a time; more would need more memory
PIECE = 2**20  # elements of a tensor that are copied and checked at a time, while they are in the cache


class Model(NamedTuple):
    """What a checkpoint holds. Without a tokenizer, ids go in and come out."""

    config: Config
    params: Params
    tokenizer: Tokenizer | None

    def __repr__(self) -> str:
        return f"Model({count(self.config):,} parameters, {self.config}, {self.tokenizer})"

    @property
    def sampling(self) -> Sampling | None:
        """What the checkpoint recommends. It stands with the tokenizer, beside the tokens that end an answer."""
        return self.tokenizer.sampling if self.tokenizer else None


class Tensor(NamedTuple):
    """A tensor as a file declares it."""

    shape: tuple[int, ...]
    dtype: str  # "F32", "BF16", "Q4_1", …


class Checkpoint(NamedTuple):
    """A checkpoint whose headers have been read and checked. Its tensors are read from the open files on demand."""

    file: Path
    format: str
    layout: Layout
    config: Config
    fields: Mapping[str, tuple[Any, str]]  # of the config: the value, and "honoured", "defaulted" or "ignored"
    tensors: Mapping[str, Tensor]
    get: Callable[[str], Float[np.ndarray, "..."]]  # float32, float16 or bfloat16 as stored, or dequantised to float32
    tokenizer: Tokenizer | None

    def dtype(self) -> str:
        """The dtype of the embedding; float32 is accurate enough for whatever is quantised."""
        kind = self.tensors[next(iter(all_tensors(self.layout, self.config)))].dtype
        return {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")

    def load(self, dtype: str | None = None, mesh: Mesh | None = None, allow_nonfinite: bool = False) -> Model:
        """The model, in float32 on a CPU and in the checkpoint's own dtype elsewhere, unless one is given.

        On a mesh each tensor goes to its devices as soon as it is read: no device holds the whole model. NaN and ∞ are
        refused by the tensor's name unless they are allowed.
        """
        dtype = dtype or ("float32" if jax.default_backend() == "cpu" else self.dtype())
        check("dtype", dtype, dtype in DTYPES, ", ".join(DTYPES))
        kind, names = np.dtype(DTYPES[dtype]), all_tensors(self.layout, self.config)
        places = dict(zip(names, jax.tree.leaves(shardings(self.config, mesh, False)), strict=True)) if mesh else {}
        check_memory(kind.itemsize * share(self.config, mesh), self.file)
        # Pages of memory are provided when they are first written, which takes as long as copying: threads share it.
        bar = progress(f"loading {self.file.name}", len(names))
        with bar as advance, ThreadPoolExecutor(THREADS) as threads:

            def put(name: str, array: Float[np.ndarray, "..."]) -> Array:
                advance(1)
                copy = owned(array, kind, name, self.file, allow_nonfinite)
                if not mesh:
                    return jnp.asarray(copy, kind)
                return jax.make_array_from_callback(copy.shape, places[name], lambda at: copy[at])

            return Model(self.config, from_named(self.layout, self.get, self.config, put, threads.map), self.tokenizer)

    def digest(self) -> str:
        """The SHA-256 of the parameters in float32, in the layout in which they are stored."""
        digest = hashlib.sha256()
        for name in all_tensors(self.layout, self.config):
            digest.update(np.ascontiguousarray(widened(self.get(name))).data)
        return digest.hexdigest()


def share(config: Config, mesh: Mesh | None) -> int:
    """The number of parameters that a device holds; on CPUs, which share their memory, that a process's own hold."""
    if not mesh:
        return count(config)
    leaves = zip(jax.tree.leaves(shapes(config)), jax.tree.leaves(shardings(config, mesh, False)), strict=True)
    held = sum(math.prod(place.shard_shape(leaf.shape)) for leaf, place in leaves)
    return held * (mesh.local_mesh.size if jax.default_backend() == "cpu" else 1)


def widened(array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """An array in float32."""
    return array.astype(np.float32, copy=False)


def all_finite(array: Float[np.ndarray, " n"]) -> bool:
    """Whether there is neither NaN nor ∞. Their bits, read as integers, are those of ∞ of the same sign, or larger."""
    signed, unsigned = (array.view(f"{kind}{array.itemsize}") for kind in "iu")
    limits = np.array([np.inf, -np.inf], array.dtype).view(unsigned.dtype)
    return bool(signed.max() < limits[0] and unsigned.max() < limits[1])


def owned(
    array: Float[np.ndarray, "..."], dtype: Any, name: str, file: object, allow_nonfinite: bool
) -> Float[np.ndarray, "..."]:
    """A copy in memory pages of its own, which jax takes over on a CPU as they are."""
    memory = mmap.mmap(-1, array.size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source, copy, good = array.reshape(-1), np.frombuffer(memory, dtype), True
    for begin in range(0, array.size, PIECE):
        part = slice(begin, begin + PIECE)
        with np.errstate(over="ignore"):
            copy[part] = source[part]
        good = good and (allow_nonfinite or all_finite(copy[part]))
    check(name, f"NaN or ∞ in {dtype}", good, "finite numbers", file)
    return copy.reshape(array.shape)


def read_at(
    file: BinaryIO, path: Path, name: str, begin: int, dtype: Any, n: int
) -> np.ndarray[tuple[int], np.dtype[Any]]:
    """The n numbers of a tensor from a byte on. Several threads may read the same file."""
    data = np.empty(n, dtype)
    view, done = data.view(np.uint8).data, 0
    while done < data.nbytes and (read := os.preadv(file.fileno(), [view[done:]], begin + done)):
        done += read
    check(name, counted(done, "byte"), done == data.nbytes, f"{data.nbytes}: the file has been changed", path)
    return data


def finite(array: Float[np.ndarray, "..."], name: str, file: object) -> Float[np.ndarray, "..."]:
    """Refuse a tensor that contains NaN or ∞. The largest and the smallest value show both."""
    wide = widened(array)
    good = bool(np.isfinite(wide.max()) and np.isfinite(wide.min()))
    check(name, f"NaN or ∞ in {array.dtype}", good, "finite numbers", file)
    return array


def narrowed(array: Float[np.ndarray, "..."], dtype: str, name: str) -> Float[np.ndarray, "..."]:
    """A tensor in the dtype in which it is to be written. Numbers too large for it are refused."""
    with np.errstate(over="ignore"):
        array = array.astype(DTYPES[dtype], copy=False)
    good = bool(np.isfinite(array.max()) and np.isfinite(array.min()))
    check(name, f"NaN, ∞ or too large a number for {dtype}", good, "finite numbers", "params")
    return array


def free_memory() -> int:
    """Bytes that are free: the accelerator's, if there is one, else the machine's."""
    stats: Any = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return 1024 * int(re.findall(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[0])
    except (OSError, IndexError):  # not Linux: all of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(need: int, file: object) -> None:
    """Refuse parameters of so many bytes where less is free, before any is read."""
    free = free_memory()
    check("memory", f"{free / 2**30:.1f} GiB free", need <= free, f"{need / 2**30:.1f} GiB for the parameters", file)


@contextmanager
def blamed_on(file: object) -> Generator[None]:
    """Whatever is refused within is the fault of this file."""
    try:
        yield
    except LlamaError as error:
        raise LlamaError(file, error.field, error.got, error.expected) from error
