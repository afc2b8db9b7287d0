"""What training minimises: the loss of a batch that a mesh divides, in a dtype of its own, and over micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from lovely_llama import Config, Params, checked_batch, cross_entropy, float32_or_wider

from ..devices.partition import split
from .attention import BLOCK
from .layers import logits


def loss(
    params: Params, tokens: Integer[Array | np.ndarray, "*batch seq"],
    targets: Integer[Array | np.ndarray, "*batch seq"], config: Config,
    first: Integer[Array | np.ndarray, "*batch seq"] | int = 0, *, keep: str = "dots", dtype: Any = None,
    size: int = BLOCK,
) -> Float[Array, ""]:  # fmt: skip
    """`lovely_llama.loss`, with rows divided over a mesh; `keep` is a name in `KEEP`, `size` a number of keys.

    `dtype` is that of the arithmetic, to which these master weights are cast."""
    ids, answers = checked_batch(tokens, targets, config, first)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:  # XLA decides inside, as on automatic axes

        def inside(params: Any, tokens: Any, targets: Any, first: Any) -> Any:
            return loss(params, tokens, targets, config, first, keep=keep, dtype=dtype, size=size)

        return jax.sharding.auto_axes(out_sharding=PartitionSpec())(inside)(params, ids, answers, first)
    params = jax.tree.map(lambda w: w.astype(dtype or w.dtype), params)
    rows = ids.reshape(-1, ids.shape[-1])
    firsts = jnp.broadcast_to(first, ids.shape).reshape(rows.shape)

    def row(tokens: Int[Array, " seq"], first: Int[Array, " seq"]) -> Float[Array, "seq vocab"]:
        return logits(params, tokens, config, first, keep=keep, size=size)

    scores = vmap(row, spmd_axis_name=split(["batch"], mesh.axis_names)[0])(rows, firsts)
    return cross_entropy(scores, answers.reshape(rows.shape))


def accumulate(
    objective: Callable[..., Array], params: Any, tokens: Int[Array, "micro batch seq"],
    targets: Int[Array, "micro batch seq"], *more: Int[Array, "micro batch seq"],
) -> tuple[Float[Array, ""], Any]:  # fmt: skip
    """The loss of all micro-batches and its gradient, Σ nᵢ/n ∇lossᵢ, where batch i has nᵢ of the n targets.

    `objective(params, tokens, targets, *more)` is the loss of one, such as `partial(loss, config=config)`. A mean of
    means would weight the targets of sparse batches more. One micro-batch is in memory at a time. Sums are float32 or
    wider, and cast back."""
    counts, value_and_grad, rows = (targets >= 0).sum((1, 2)), jax.value_and_grad(objective), (tokens, targets, *more)

    def add(sums: Any, micro: tuple[Array, ...]) -> tuple[Any, None]:
        share, parts = micro[0], value_and_grad(params, *micro[1:])
        return jax.tree.map(lambda sum, part: sum + share.astype(sum.dtype) * part.astype(sum.dtype), sums, parts), None

    one = jax.eval_shape(value_and_grad, params, *(ids[0] for ids in rows))
    zeros = jax.tree.map(lambda part: float32_or_wider(jnp.zeros_like(part)), one)
    sums, _ = lax.scan(add, zeros, (counts / jnp.maximum(counts.sum(), 1), *rows))
    return jax.tree.map(lambda sum, part: sum.astype(part.dtype), sums, one)
