"""A step of training or of decoding, compiled for devices that need not be there; a process of its own, for `plan`.

It takes a request as its argument and writes a result to stdout, both one line of JSON. Whatever the compiler prints
goes to stderr, and when stdin is closed, the process ends.
"""

import contextlib
import importlib
import json
import math
import os
import re
import sys
import threading
import time
from functools import partial
from typing import Any, NamedTuple, cast

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from lovely_llama import Cache, Config, LlamaError, Params, RopeScaling, check, moments, shapes

from ..devices.mesh import batch_sharding, make_mesh, shardings
from ..extras import extra
from ..fast import llama
from ..fast.layers import Caches, stacked_shapes
from ..formats.model import DTYPES
from ..strict_json import to_json
from ..training.step import StepOptions, step
from .chips import Slice, links, parse_chips
from .estimates import Task
from .hlo import Program, read_program


class Request(NamedTuple):
    """What is to be compiled."""

    task: Task
    chips: str
    mesh: dict[str, int]


# ---- Devices ---------------------------------------------------------------------------------------------------------


def devices_of(part: Slice) -> list[Any]:
    """The devices of a slice: of this CPU, or as libtpu describes those of a TPU."""
    if part.chip is None:
        jax.config.update("jax_num_cpu_devices", part.devices)
        return jax.devices()
    library = os.environ.get("TPU_LIBRARY_PATH") or extra("libtpu", "tpu").get_library_path()
    check("TPU_LIBRARY_PATH", library, os.path.isfile(library), "libtpu.so", "environment")
    alone = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(part.shape) == 1 else {}
    described: Any = importlib.import_module("jax.experimental.topologies").get_topology_desc
    try:
        return described(str(part), "tpu", **alone).devices
    except jax.errors.JaxRuntimeError as error:
        check("libtpu", brief(error), "INVALID_ARGUMENT" in str(error), "that of jax[tpu]", "environment")
        raise LlamaError("arguments", "chips", part, f"a shape that libtpu knows: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """The first line of an error, without its kind."""
    return re.sub(r"^[A-Z_]+: ", "", str(error).split("\n")[0])[:300]


# ---- Programs --------------------------------------------------------------------------------------------------------


def placed(tree: Any, where: Any, dtype: Any = None) -> Any:
    """Shapes with their shardings."""

    def leaf(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree, where)


def training(task: Task, mesh: Mesh) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The step of `train`: the program, its arguments, and those of them that a device holds from step to step."""
    config, alone = task.config, NamedSharding(mesh, PartitionSpec())
    where = shardings(config, mesh, True)
    params = placed(stacked_shapes(config), where)
    state = jax.eval_shape(moments, params)
    state = placed(state, state._replace(step=alone, first=where, second=where))
    ids = jax.ShapeDtypeStruct((task.batch, task.seq), jnp.int32, sharding=batch_sharding(mesh))
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=alone)
    options = StepOptions(config, task.batch, 1.0, 0.1, (0.9, 0.95), task.dtype, task.remat, 1.0)
    held = {"weights": params, "moments": state, "tokens": (ids, ids)}
    program = jax.jit(step.function, **step.options)  # without compiler options, which are for the devices here
    return program, (None, params, state, rate, (ids, ids), options), held


@partial(jax.jit, static_argnames="config", donate_argnames="caches")
def next_tokens(
    params: Params, tokens: Int[Array, " batch"], caches: Caches, positions: Int[Array, " batch"], config: Config
) -> tuple[Int[Array, " batch"], Caches]:
    """One token more for each row, at a position of its own: the likeliest."""

    def row(token: Int[Array, ""], cache: Caches, position: Int[Array, ""]) -> tuple[Int[Array, ""], Caches]:
        logits, cache = llama(params, token[None], cache, position, config)
        return jnp.argmax(logits[0]).astype(token.dtype), cache

    return jax.vmap(row)(tokens, caches, positions)


def decoding(task: Task, mesh: Mesh) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """One token for every row, with a cache of `seq` positions: the program, its arguments, and what a device holds.

    Layers stand in a tuple, as in `generate`: a scan would copy the whole cache at every token."""
    config, dtype = task.config, DTYPES[task.dtype]
    where: Any = shardings(config, mesh, False)
    params, rows = placed(shapes(config), where, dtype), cast(Any, batch_sharding(mesh)).spec[0]
    shape = (task.batch, config.kv_heads, task.seq, config.head_dim)
    heads = NamedSharding(mesh, PartitionSpec(rows, where.blocks[0].attn.k.spec[0]))
    array: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=heads)
    ids = jax.ShapeDtypeStruct((task.batch,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(rows)))
    caches = (Cache(array, array),) * config.layers
    return next_tokens, (params, ids, caches, ids, config), {"weights": params, "cache": caches, "tokens": (ids, ids)}


# ---- The result ------------------------------------------------------------------------------------------------------


def compiled(request: Request) -> dict[str, Any]:
    """What the compiler says of a step; where the step does not fit, what it says of that."""
    part = parse_chips(request.chips)
    mesh = make_mesh(request.mesh, devices_of(part))
    with jax.set_mesh(mesh):
        program, arguments, held = (decoding if request.task.decode else training)(request.task, mesh)
        lowered, began = program.lower(*arguments), (time.perf_counter(), time.process_time())
        said = {"held": {name: sum(map(on_a_device, jax.tree.leaves(tree))) for name, tree in held.items()}}
        try:
            done = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return said | {"fits": False, "reason": refusal(error), **since(*began)}
    names = ("argument_size", "output_size", "alias_size", "temp_size", "peak_memory")
    sizes = {name: getattr(done.memory_analysis(), f"{name}_in_bytes") for name in names}
    found = read_program(done.as_text() or "", part.devices)
    return said | since(*began) | {"fits": True, "memory": sizes} | executed(found, part, mesh)


def since(wall: float, cpu: float) -> dict[str, float]:
    """Seconds that have passed, and those of the processor's, on all cores."""
    return {"compile_seconds": time.perf_counter() - wall, "compile_cpu_seconds": time.process_time() - cpu}


def refusal(error: BaseException) -> str:
    """Why the compiler refuses a program that is too large; anything else it says is a fault."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
        raise error
    return brief(error)


def on_a_device(leaf: Any) -> int:
    """Bytes of an array on each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def executed(found: Program, part: Slice, mesh: Mesh) -> dict[str, Any]:
    """A program's products and collectives, and for each of these how many links a device has for it."""
    devices = list(mesh.devices.flat)

    def fields(one: Any) -> dict[str, Any]:
        paths = links(part, [tuple(devices[i].coords) for i in one.group]) if part.chip else 0
        return one._asdict() | {"group": len(one.group), "sent": one.sent, "links": paths}

    return {"flops": found.flops, "endless": found.endless, "collectives": [fields(one) for one in found.collectives]}


def read_request(text: str) -> Request:
    """A request out of JSON."""
    fields = json.loads(text)
    config = fields["task"].pop("config")
    scaling = config.pop("rope_scaling")
    config = Config(**config, rope_scaling=RopeScaling(*scaling) if scaling else None)
    return Request(Task(config, **fields["task"]), fields["chips"], fields["mesh"])


def main() -> int:
    """The process."""
    request, answer = read_request(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    try:
        result: dict[str, Any] = compiled(request)
    except LlamaError as error:
        result = {"error": [error.file, error.field, error.got, error.expected]}
    with contextlib.closing(answer):
        answer.write(to_json(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
