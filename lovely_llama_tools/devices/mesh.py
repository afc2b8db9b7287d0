"""A mesh of devices: as a user names it, and what of a model and of a batch lies where on it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lovely_llama import Config, Params, check

from ..extras import counted
from .partition import is_stacked, specs, split

AXES = ("data", "fsdp", "tensor", "seq")
HELP = (
    "devices per axis, such as data=2,tensor=4: data and fsdp split the batch, fsdp the storage of parameters, tensor "
    "the heads and the width of layers, seq the tokens of a sequence"
)


def parse_mesh(text: str) -> dict[str, int]:
    """The number of devices along each axis: "data=2,tensor=4"."""
    sizes = dict.fromkeys(AXES, 1)
    found = re.findall(r"(?:^|,)(\w+)=(\d{1,9})(?=,|$)", text, re.ASCII)
    good = ",".join(f"{name}={size}" for name, size in found) == text
    good = good and all(name in AXES and int(size) > 0 for name, size in found)
    good = good and len(dict(found)) == len(found) > 0
    check("mesh", repr(text), good, f"sizes from 1 for some of {', '.join(AXES)}, such as data=2,tensor=4")
    return sizes | {name: int(size) for name, size in found}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices, or of these, along whose axes XLA moves data by itself; absent axes have size 1."""
    whole = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices() if devices is None else devices
    need, there, said = math.prod(whole), len(devices), counted(math.prod(whole), "device")
    many = f"; or XLA_FLAGS=--xla_force_host_platform_device_count={need}, which divides a CPU"
    hint = many if devices[0].platform == "cpu" else ""
    check("mesh", said, need == there, f"{there}, as many as there are, such as --mesh data={there}{hint}")
    # An axis of the mesh may be a part of one of a TPU's torus, which jax.make_mesh refuses.
    return Mesh(create_device_mesh(whole, devices, allow_split_physical_axes=True), AXES)


def shardings(config: Config, mesh: Mesh, stacked: bool) -> Params:
    """Where each parameter lies, its layers in a tuple or stacked; what does not divide is refused by name.

    A mesh with explicit axes, which `jax.make_mesh` makes, gives its devices: its axes become automatic.
    """
    parts, mesh = specs(config, mesh.shape), Mesh(mesh.devices, mesh.axis_names)
    if stacked:
        (first, *_) = parts.blocks
        parts = parts._replace(blocks=jax.tree.map(lambda spec: PartitionSpec(None, *spec), first))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parts)


def places(tree: Any, config: Config, mesh: Mesh | None) -> Any:
    """Where the arrays of a tree lie: on a mesh whole models in it are split, and other arrays lie on every device."""

    def of(node: Any) -> Any:
        if isinstance(node, Params) and mesh:
            return shardings(config, mesh, is_stacked(node))
        return NamedSharding(mesh, PartitionSpec()) if mesh else SingleDeviceSharding(jax.devices()[0])

    return jax.tree.map(of, tree, is_leaf=lambda node: isinstance(node, Params) and mesh is not None)


def place(tree: Any, config: Config, mesh: Mesh | None) -> Any:
    """A tree where it is to lie on a mesh, if there is one.

    It goes there from the host: of an array on a device, jax makes one that other processes share only if it is split.
    """
    host = jax.tree.map(lambda leaf: np.asarray(leaf) if leaf.ndim else leaf.item(), tree)
    return jax.device_put(host, places(tree, config, mesh)) if mesh else tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie, and the tokens of each."""
    return NamedSharding(mesh, split(("batch", "seq"), mesh.axis_names))


def check_rows(rows: int, mesh: Mapping[str, int], what: str = "batch") -> None:
    """Refuse a number of rows that the mesh does not divide evenly."""
    groups = mesh["data"] * mesh["fsdp"]
    check(what, rows, rows % groups == 0, f"a multiple of {groups}, data × fsdp of the mesh")


def check_seq(seq: int, mesh: Mapping[str, int]) -> None:
    """Refuse a length of rows that the mesh does not divide evenly."""
    check("ctx", seq, seq % mesh["seq"] == 0, f"a multiple of {mesh['seq']}, seq of the mesh")
