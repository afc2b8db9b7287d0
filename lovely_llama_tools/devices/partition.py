"""Which axis of an array is split over which axes of a mesh of devices: the rules, and every partition they give."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lovely_llama import Block, Config, Params, axes, check

# The axes of a mesh over which each of our axes is split. "tensor" divides each product of a layer, Shoeybi et al.
# 2019, arXiv:1909.08053, §3; "fsdp" stores matrices in parts, Rajbhandari et al. 2019, arXiv:1910.02054, §5 (ZeRO).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": ("seq",),
    "dim": ("fsdp",),
    "vocab": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden_dim": ("tensor",),
}
# Where key/value heads are too few to be split, the query heads of each are.
FEW_KV_HEADS: dict[str, tuple[str, ...]] = {**RULES, "kv_heads": (), "q_per_kv": ("tensor",)}


def split(axes: Sequence[str], names: Sequence[str], rules: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """How an array with these axes is split over a mesh whose axes have these names."""
    return PartitionSpec(*(tuple(name for name in rules.get(axis, ()) if name in names) or None for axis in axes))


def sharded(x: Float[Array, "*shape"], *axes: str) -> Float[Array, "*shape"]:
    """x, on a mesh of devices (`jax.set_mesh`) split by its axes, where "" is one that stays whole; else unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, split(axes, mesh.axis_names))


def is_stacked(params: Params) -> bool:
    """Whether the layers of a model are stacked on an axis, in one Block, and not in a tuple."""
    return isinstance(cast(Any, params.blocks), Block)


def specs(config: Config, mesh: Mapping[str, int] | None = None) -> Params:
    """Every parameter's partition over a mesh with axes of these sizes, read off its annotation by `RULES`.

    With parameters placed so, XLA's partitioner derives all communication: Xu et al. 2021, arXiv:2105.04663. An axis
    that the mesh does not divide is refused; without a mesh, nothing is checked."""
    sizes = mesh or dict.fromkeys(("data", "fsdp", "tensor", "seq"), 1)
    rules = FEW_KV_HEADS if config.kv_heads % sizes.get("tensor", 1) else RULES

    def of(own: str) -> Any:
        for axis in own.split():
            names = rules.get(axis, ())
            size, parts = getattr(config, axis), math.prod(sizes.get(name, 1) for name in names)
            padded = f", such as {-(-size // parts) * parts} (--vocab pads a new model's)" if axis == "vocab" else ""
            how = f"a multiple of {parts}{padded}, or a mesh without {' and '.join(names)}"
            check(axis, size, size % parts == 0, how, "mesh")
        return split(own.split(), [*sizes], rules)

    return jax.tree.map(of, axes(config))
