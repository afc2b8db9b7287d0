"""Orbax's folders, as runs on several devices leave them: of each array the parts that the devices held.

The arrays are zarr's, in a store of tensorstore's, OCDBT. Parameters are named as in our own tree, and layers stacked;
beside them stand a config and a tokenizer as in Hugging Face's folders.
"""

import logging
import os
import sys
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lovely_llama import Config, LlamaError, check, check_tensors

from ..extras import extra
from ..tokens.base import check_inside
from .hugging_face import CONFIG, read_tokenizer
from .hugging_face_config import read_config, read_fields
from .layout import OURS, all_tensors
from .model import Checkpoint, Tensor

ORBAX, METADATA, EXTRA = "orbax", "_METADATA", "scale"
PARAMS, NORMS = "params", "params.blocks.attn_norm"  # the part of the tree that is the model; its smallest stack
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def is_orbax(path: Path) -> bool:
    """Whether a folder is one of these."""
    return (path / ORBAX).exists()


def open_orbax(path: Path, _: ExitStack, allow: Collection[str] = ()) -> Checkpoint:
    """A folder of a run. Of its arrays only the headers are read, and no file stays open."""
    config, fields = read_config(read_fields(path / CONFIG, path), path / CONFIG, allow)
    stored = open_arrays(path / ORBAX, {PARAMS})
    shapes = {name: array.shape for name, array in stored.items()}
    check_tensors(stacked_shapes(config), shapes, path / ORBAX)
    pieces = len(stored[NORMS].kvstore.list().result())
    check("num_hidden_layers", config.layers, config.layers <= pieces, f"no more than {pieces}, stored", path / CONFIG)

    def get(name: str) -> Float[np.ndarray, "..."]:
        array, at = place_of(name)
        with readable(path / ORBAX, array):
            return stored[array][at].read().result()

    kinds = {name: KINDS[array.dtype.name] for name, array in stored.items()}
    tensors = {name: Tensor(shape, kinds[place_of(name)[0]]) for name, shape in all_tensors(OURS, config).items()}
    return Checkpoint(path, "Orbax", OURS, config, fields, tensors, get, read_tokenizer(path, config.vocab))


def place_of(name: str) -> tuple[str, tuple[int, ...]]:
    """The array that a parameter of ours is in, and where in it."""
    field, *rest = name.split(".")
    return ".".join((PARAMS, field, *rest[1:])), tuple(map(int, rest[:1]))


def stacked_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the model's arrays."""
    one = {place_of(name): shape for name, shape in all_tensors(OURS, replace(config, layers=1)).items()}
    return {name: (config.layers, *shape) if layer else shape for (name, layer), shape in one.items()}


@contextmanager
def readable(folder: Path, name: str) -> Generator[None]:
    """Whatever tensorstore finds wrong within is the fault of this array."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise LlamaError(folder, name, f"{str(error).partition(' [')[0]:.200}", "an array that can be read") from error


def open_arrays(folder: Path, parts: set[str]) -> dict[str, Any]:
    """The arrays of these parts of the tree, by name, from each of which any range can be read.

    tensorstore follows links, so none may lead out of the folder above.
    """
    for entry in folder.parent.rglob("*"):
        check_inside(entry, folder.parent)
    tensorstore, file, opened = extra("tensorstore", EXTRA), folder / METADATA, dict[str, Any]()
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{os.path.abspath(folder)}/"}}
    for name in names_in(read_fields(file), file):
        if name.partition(".")[0] in parts:
            with readable(folder, name):
                spec = {"driver": "zarr", "kvstore": {**store, "path": f"{name}/"}, "fill_missing_data_reads": False}
                array = opened[name] = tensorstore.open(spec, open=True, read=True).result()
            kind, chunk = array.dtype.name, array.chunk_layout.read_chunk.shape
            check(name, f"numbers in {kind}", kind in KINDS, ", ".join(KINDS), folder)
            small = all(n <= size for n, size in zip(chunk, array.shape, strict=True))
            check(name, f"pieces of shape {chunk}", small, f"none larger than {array.shape}", folder)
    return opened


def names_in(fields: Mapping[str, Any], file: Path) -> list[str]:
    """The names of all arrays, as orbax describes the tree."""
    kind = (fields.get("use_ocdbt"), fields.get("use_zarr3"))
    check("use_ocdbt, use_zarr3", kind, kind == (True, False), (True, False), file)
    try:
        leaves = [leaf for leaf in fields["tree_metadata"].values() if not leaf["value_metadata"]["skip_deserialize"]]
        return [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
    except (AttributeError, KeyError, TypeError) as error:
        raise LlamaError(file, "tree_metadata", "another description", "orbax's, of a tree") from error


def name_of(at: Any, _: Any = None) -> str:
    """The name of an array by its place in the tree."""
    return jax.tree_util.keystr(at, simple=True, separator=".")


def read_tree(path: Path, like: Mapping[str, Any], places: Any) -> Any:
    """The parts of a run's tree that are like these, each device's share read straight onto it."""
    stored, names = open_arrays(path / ORBAX, {*like}), jax.tree.map_with_path(name_of, like)
    wanted = dict(zip(jax.tree.leaves(names), (leaf.shape for leaf in jax.tree.leaves(like)), strict=True))
    check_tensors(wanted, {name: array.shape for name, array in stored.items()}, path / ORBAX)

    def read(name: str, place: Any) -> Any:
        with readable(path / ORBAX, name):
            return jax.make_array_from_callback(wanted[name], place, lambda at: stored[name][at].read().result())

    return jax.tree.map(read, names, places)


def start_writing(folder: Path, tree: Mapping[str, Any]) -> Callable[[], None]:
    """Begin a folder with the arrays of a tree. All processes do so, and each writes what its own devices hold.

    It returns as soon as that has been copied off them, and gives what waits for the end. A layer is stored by itself,
    so that reading one does not read all.
    """
    orbax = extra("orbax.checkpoint", EXTRA)

    def stored(at: Any, _: Any) -> Any:
        return orbax.SaveArgs(shard_axes=(0,) if ".blocks." in name_of(at) else ())

    with failing_as_disks():
        writer = orbax.StandardCheckpointer()
        writer.save(folder.absolute(), tree, save_args=jax.tree.map_with_path(stored, tree))
    return failing_as_disks()(writer.close)


@contextmanager
def failing_as_disks() -> Generator[None]:
    """Whatever orbax and tensorstore raise while they write is the fault of the disk, or of another process."""
    be_quiet()
    try:
        yield
    except Exception as error:
        raise OSError(str(error).partition(" [")[0].rpartition(": ")[2]) from error


@cache
def be_quiet() -> None:
    """Keep what is raised here from being shown besides, with its stack, by threads that outlive it."""
    show = sys.unraisablehook
    sys.unraisablehook = lambda seen: None if str(seen.exc_value) == "Event loop is closed" else show(seen)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
