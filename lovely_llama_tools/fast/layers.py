"""The model over its layers: in a loop or a scan, recomputed for derivatives, and sharded over a mesh."""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jaxtyping import Array, Float, Integer

import lovely_llama
from lovely_llama import (
    Block,
    Cache,
    Config,
    Number,
    Params,
    Positions,
    check,
    checked_tokens,
    empty_cache,
    positions,
    shapes,
)

from ..devices.partition import is_stacked, sharded
from .attention import BLOCK, attention

Caches = tuple[Cache, ...] | Cache  # of all layers, in a tuple or stacked as their blocks are

# What a layer stores for its derivative: its products with weights, of size seq, or its input alone. The rest is
# recomputed; attention's scores, of size seq², are never all in memory. A checkpointed layer is also traced only once.
KEEP = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "nothing": None}


# ---- Layers in a tuple, or stacked on an axis ------------------------------------------------------------------------


def stack(layers: tuple[Any, ...]) -> Any:
    """The blocks in a tuple, or their caches, as one with a leading axis of layers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def in_tuple(params: Params) -> Params:
    """The same parameters with their layers in a tuple."""
    if not is_stacked(params):
        return params
    layers = range(len(cast(Any, params.blocks).attn_norm))
    return params._replace(blocks=tuple(jax.tree.map(operator.itemgetter(i), params.blocks) for i in layers))


def stacked_shapes(config: Config) -> Params:
    """Every parameter's shape, layers stacked."""
    whole = shapes(config)
    return whole._replace(blocks=jax.eval_shape(stack, whole.blocks))


def shapes_in_tuple(params: Params, config: Config) -> Params:
    """The shapes of parameters whose layers are in a tuple or stacked, as the library's checks expect them."""
    if not is_stacked(params):
        return params
    layers = {leaf.shape[:1] for leaf in jax.tree.leaves(params.blocks)}
    check("blocks", f"stacks of {layers}", layers == {(config.layers,)}, f"{config.layers} layers", "params")
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params.blocks)
    return params._replace(blocks=(one,) * config.layers)


# ---- The model -------------------------------------------------------------------------------------------------------


def embed(params: Params, tokens: Integer[Array | np.ndarray, " seq"]) -> Float[Array, "seq dim"]:
    """`lovely_llama.embed`, sharded over a mesh."""
    return sharded(lovely_llama.embed(params._replace(embed=sharded(params.embed, "vocab", "")), tokens), "seq", "")


def block(
    w: Block, x: Float[Array, "seq dim"], cache: Cache, where: Positions, eps: Number, *, size: int = BLOCK
) -> tuple[Float[Array, "seq dim"], Cache]:
    """`lovely_llama.block`, its attention by blocks of `size` keys, sharded over a mesh."""
    x, cache = lovely_llama.block(w, x, cache, where, eps, attention=partial(attention, size=size))
    return sharded(x, "seq", ""), cache


def fold_layers(
    layer: Callable[[Any, Any, Any], Any], x: Float[Array, "seq dim"], blocks: tuple[Block, ...] | Block, cache: Caches
) -> tuple[Float[Array, "seq dim"], Caches]:
    """Send x through the layers: by a loop over a tuple, by a scan, compiled once, over stacked ones."""
    if isinstance(blocks, Block):
        return lax.scan(lambda x, both: layer(x, *both), x, (blocks, cache))
    caches = list[Cache]()
    for w, old in zip(blocks, cache, strict=True):
        x, new = layer(x, w, old)
        caches.append(new)
    return x, tuple(caches)


def llama(
    params: Params, tokens: Integer[Array | np.ndarray, " seq"] | Sequence[int], cache: Caches,
    start: Number, config: Config, first: Integer[Array | np.ndarray, " seq"] | int = 0, *, keep: str = "dots",
    size: int = BLOCK,
) -> tuple[Float[Array, "seq vocab"], Caches]:  # fmt: skip
    """`lovely_llama.llama`, whose layers may be stacked too; `keep` is a name in `KEEP`, `size` a number of keys.

    Of the cache only blocks that are filled are read. With an int for `start` the result is differentiable; with an
    array, such as `jit` makes of an argument, it is not."""
    ids = checked_tokens(shapes_in_tuple(params, config), tokens, cache, start, config, first)
    where = positions(start, len(ids), config, first)
    step = jax.checkpoint(lambda x, w, cache: block(w, x, cache, where, config.eps, size=size), policy=KEEP[keep])
    x, cache = fold_layers(step, embed(params, ids), params.blocks, cache)
    return sharded(vmap(lambda x: lovely_llama.readout(params, x, config.eps))(x), "seq", "vocab"), cache


def logits(
    params: Params, tokens: Integer[Array | np.ndarray, " seq"] | Sequence[int], config: Config,
    first: Integer[Array | np.ndarray, " seq"] | int = 0, *, keep: str = "dots", size: int = BLOCK,
) -> Float[Array, "seq vocab"]:  # fmt: skip
    """`llama` from position 0, without the cache."""
    caches = empty_cache(config, np.size(tokens), jnp.result_type(params.embed))
    cache = vmap(lambda _: caches[0])(jnp.arange(config.layers)) if is_stacked(params) else caches
    return llama(params, tokens, cache, 0, config, first, keep=keep, size=size)[0]
