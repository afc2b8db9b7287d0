"""Attention, a block of keys at a time: memory is linear in seq, and of a cache no more is read than is filled."""

import math
from functools import partial

from jax import checkpoint, lax
from jax import numpy as jnp
from jaxtyping import Array, Float

import lovely_llama
from lovely_llama import Attention, Cache, Number, Positions, float32_or_wider

BLOCK = 256  # keys per iteration; half that for a single token, which then reads fewer unused positions


def attend(
    q: Float[Array, " head_dim"], keys: Float[Array, "ctx head_dim"], values: Float[Array, "ctx head_dim"],
    last: Number, first: Number = 0, *, filled: Number | None = None, size: int = BLOCK,
) -> Float[Array, " head_dim"]:  # fmt: skip
    """`lovely_llama.attend` as an online softmax over blocks of `size` keys.

    Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3; Rabe & Staats 2021, arXiv:2112.05682, §2. Blocks from
    position `filled` on, which hold no keys yet, are not read. The loop is differentiable unless `filled` is an array.
    """
    ctx, head_dim = keys.shape
    size = min(size, ctx)
    dtype = float32_or_wider(q).dtype

    def fold(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        shift, total, average = state
        begin = jnp.minimum(i * size, ctx - size)  # the last block may overlap the one before
        position = begin + jnp.arange(size)
        k = float32_or_wider(lax.dynamic_slice_in_dim(keys, begin, size))
        v = float32_or_wider(lax.dynamic_slice_in_dim(values, begin, size))
        visible = (jnp.maximum(i * size, first) <= position) & (position <= last)
        scores = jnp.where(visible, float32_or_wider(q) / math.sqrt(head_dim) @ k.T, -jnp.inf)
        # Any shift near the maximum cancels. `ceil` has zero derivative, so autodiff treats it as a constant.
        new_shift = jnp.ceil(jnp.maximum(shift, scores.max()))
        rescale = jnp.exp(shift - new_shift)
        weights = jnp.exp(scores - new_shift)
        return new_shift, rescale * total + weights.sum(), rescale * average + weights @ v

    zeros = jnp.zeros_like(q, dtype)
    lowest = jnp.full_like(zeros[0], jnp.finfo(dtype).min)  # not −∞: ∞ − ∞ is NaN
    blocks = ((ctx if filled is None else filled) + size - 1) // size
    state = lax.fori_loop(0, blocks, checkpoint(fold), (lowest, zeros[0], zeros))
    return (state[2] / state[1]).astype(q.dtype)


def attention(
    w: Attention, x: Float[Array, "seq dim"], cache: Cache, where: Positions, *, size: int = BLOCK
) -> tuple[Float[Array, "seq dim"], Cache]:
    """`lovely_llama.attention` by blocks of keys, up to the last that this call fills."""
    size = size if len(x) > 1 else max(size // 2, 1)
    by_blocks = partial(attend, filled=where.start + len(x), size=size)
    return lovely_llama.attention(w, x, cache, where, attend=by_blocks)
