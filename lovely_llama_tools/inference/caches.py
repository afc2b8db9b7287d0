"""Caches and other arguments of programs, placed on the devices of a model's parameters."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from lovely_llama import Cache, Config, Params, check_params, empty_cache

from ..devices.partition import RULES, split
from ..fast.layers import in_tuple
from ..formats.model import Model


def runnable(model: Model) -> Model:
    """The model checked, its layers in a tuple, its parameters arrays of jax; itself where it is so already."""
    params = in_tuple(model.params)
    check_params(params, model.config)
    ready = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    params = params if ready else jax.tree.map(jnp.asarray, params)
    return model if params is model.params else model._replace(params=params)


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of the parameters; None on a single device."""
    found: Any = params.embed.sharding
    return found.mesh if isinstance(found, NamedSharding) else None


def running(params: Params) -> AbstractContextManager[Any]:
    """A context in which programs shard their results over the mesh of the parameters."""
    mesh = mesh_of(params)
    return jax.set_mesh(mesh) if mesh else nullcontext()


def groups(params: Params) -> int:
    """The number of device groups over which the rows of a batch are split."""
    mesh = mesh_of(params)
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"]) if mesh else 1


def everywhere(params: Params, numbers: Int[Array | np.ndarray, "*shape"]) -> Int[Array, "*shape"]:
    """Replicate an array over all devices of the parameters."""
    mesh = mesh_of(params)
    array = jnp.asarray(numbers)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec())) if mesh else array


def cache_sharding(params: Params, rows: bool) -> NamedSharding | None:
    """The sharding of keys and values: that of the k and v matrices; the rows of a batch are split over `groups`."""
    mesh, made = mesh_of(params), params.blocks[0].attn.k.sharding
    if mesh is None:
        return None
    batch = split(["batch"], mesh.axis_names) if rows else ()
    return NamedSharding(mesh, PartitionSpec(*batch, *cast(NamedSharding, made).spec[:1]))


def new_cache(params: Params, config: Config, room: int, rows: int | None = None) -> tuple[Cache, ...]:
    """`empty_cache`, with a leading axis of `rows` if given, created directly with its sharding."""
    lead, place = (() if rows is None else (rows,)), cache_sharding(params, rows is not None)
    wanted = jax.eval_shape(lambda: empty_cache(config, room, params.embed.dtype))

    def zeros(leaf: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros((*lead, *leaf.shape), leaf.dtype, device=place)

    return jax.tree.map(zeros, wanted)
