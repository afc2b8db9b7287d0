"""Llama as mathematics: one file of pure JAX that reads like the papers.

Functions are written for one token, one head or one vector; `vmap` adds the other axes. Shapes stand in the signatures.
An axis has one name everywhere, that of the `Config` field which holds its length:

    seq       tokens in this call                      ctx         positions in the cache
    dim       width of the residual stream             hidden_dim  width inside the feed-forward
    kv_heads  key/value heads                          q_per_kv    query heads that share one of them
    head_dim  width of a head                          pairs       head_dim / 2, its rotation planes
    vocab     size of the vocabulary                   layers      blocks, each fed by the one before
    batch     sequences, from part 6 on

Matrices are stored [out, in] and applied as W @ x. A rotary pair is two neighbouring rows, as in Meta's and llama2.c's
checkpoints. Positions are absolute and start at 0. Whatever the dtype of the parameters, the arithmetic inside norms,
rotations, softmax and the loss is float32 or wider, and the result is cast back.

Llama: Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama 3: Dubey et al. 2024, arXiv:2407.21783.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = [
    "CONFIGS", "Attention", "Block", "Cache", "Caches", "Config", "FeedForward", "LlamaError", "Params", "RopeScaling",
    "Sampling", "attend", "attention", "block", "check_cache", "check_causality", "check_config", "check_heads",
    "check_rotation", "check_rows", "check_tokens", "choose", "count", "embed_tokens", "empty_cache", "fold_layers",
    "greedy", "hidden_states", "init", "llama", "logits", "loss", "min_p", "readout", "repetition_penalty", "rms_norm",
    "rope", "rope_angles", "rope_frequencies", "shapes", "silu", "softmax", "specs", "stack", "swiglu", "temperature",
    "top_k", "top_p",
]  # fmt: skip

# ---- 1. Errors and checks --------------------------------------------------------------------------------------------


class LlamaError(ValueError):
    """Bad input. Its one line reads `file: field: got …, expected …`."""

    def __init__(self, file: object, field: str, got: object, expected: object) -> None:
        super().__init__(f"{file}: {field}: got {got}, expected {expected}")
        self.file, self.field = str(file), field


def check(field: str, got: object, ok: bool, expected: object, file: object = "arguments") -> None:
    """Raise LlamaError unless ok."""
    if not ok:
        raise LlamaError(file, field, got, expected)


def check_config(config: Any, file: object = "config") -> None:
    """Refuse a `Config` that describes no Llama, before its sizes are used."""
    must, scaling = partial(check, file=file), config.rope_scaling
    for field in ("vocab", "dim", "layers", "kv_heads", "q_per_kv", "head_dim", "hidden_dim", "ctx"):
        size = getattr(config, field)
        must(field, size, type(size) is int and 1 <= size < 2**31, "a whole number from 1 to 2147483647")
    must("head_dim", config.head_dim, config.head_dim % 2 == 0, "an even number")
    must("eps", config.eps, 0 < config.eps < math.inf, "a finite number above 0")
    must("theta", config.theta, 1 < config.theta < math.inf, "a finite number above 1")
    if scaling:
        must("rope_scaling", scaling.kind, scaling.kind in ("linear", "llama3", "yarn"), "linear, llama3 or yarn")
        must("rope_scaling.factor", scaling.factor, 1 <= scaling.factor < math.inf, "a finite number of at least 1")
    if scaling and scaling.kind != "linear":
        must("rope_scaling.original_ctx", scaling.original_ctx, scaling.original_ctx > 0, "a whole number above 0")
        must("rope_scaling", (scaling.low, scaling.high), 0 < scaling.low < scaling.high, "0 < low < high")
        factor = scaling.attention_factor
        must("rope_scaling.attention_factor", factor, 0 < factor < math.inf, "a finite number above 0")


def check_tokens(tokens: Any, vocab: int, limit: int, file: object = "arguments") -> Int[np.ndarray, " seq"]:
    """Refuse token ids outside the vocabulary, an empty sequence, or more than `limit` ids; return them as int32.

    Inside `jit` all three would pass in silence: an index out of range is clamped.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise LlamaError(file, "tokens", "rows of different lengths", "one sequence of integers") from error
    must = partial(check, "tokens", file=file)
    must(f"{ids.size} tokens", 0 < ids.size <= limit, f"1 to {limit}")
    must(f"{ids.dtype} with {ids.ndim} axes", ids.ndim == 1 and ids.dtype.kind in "iu", "one sequence of integers")
    wrong = ids[(ids < 0) | (ids >= vocab)]
    must(wrong[:1], not wrong.size, f"ids from 0 to {vocab - 1}")
    return ids.astype(np.int32)


# ---- 2. Nouns: the configuration, the parameters, the cache ----------------------------------------------------------


class RopeScaling(NamedTuple):
    """How rotary frequencies are slowed for contexts longer than the training context: see `rope_frequencies`."""

    kind: str  # "linear", "llama3" or "yarn"
    factor: float
    original_ctx: int = 0
    # A pair that turns fewer than `low` times in original_ctx is slowed by the whole factor, one that turns more than
    # `high` times not at all: low_freq_factor and high_freq_factor for llama3, beta_slow and beta_fast for yarn.
    low: float = 0
    high: float = 0
    attention_factor: float = 1


@dataclass(frozen=True)
class Config:
    """All hyperparameters. Frozen and hashable, hence a valid static argument of `jit`; none has a default."""

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
    """W_Q, W_K, W_V and W_O, the axis of heads split into key/value heads and the query heads that share one."""

    q: Float[Array, "*layers kv_heads q_per_kv head_dim dim"]
    k: Float[Array, "*layers kv_heads head_dim dim"]
    v: Float[Array, "*layers kv_heads head_dim dim"]
    o: Float[Array, "*layers dim kv_heads q_per_kv head_dim"]


class FeedForward(NamedTuple):
    """The three matrices of `swiglu`."""

    gate: Float[Array, "*layers hidden_dim dim"]
    up: Float[Array, "*layers hidden_dim dim"]
    down: Float[Array, "*layers dim hidden_dim"]


class Block(NamedTuple):
    """One layer, or with a leading axis all of them."""

    attn_norm: Float[Array, "*layers dim"]
    attn: Attention
    ffn_norm: Float[Array, "*layers dim"]
    ffn: FeedForward


class Params(NamedTuple):
    """A whole model."""

    embed: Float[Array, "vocab dim"]
    blocks: tuple[Block, ...] | Block  # a tuple of layers, or one Block of layers stacked on axis 0
    norm: Float[Array, " dim"]
    unembed: Float[Array, "vocab dim"] | None  # None in a tied model, where embed serves for both


class Cache(NamedTuple):
    """What a layer remembers of the tokens so far."""

    keys: Float[Array, "*layers kv_heads ctx head_dim"]
    values: Float[Array, "*layers kv_heads ctx head_dim"]


Caches = tuple[Cache, ...] | Cache  # of all layers, in a tuple or stacked as their blocks are
Position = Int[Array, ""] | int


def by_axes(config: Config, leaf: Callable[[list[str]], Any]) -> Any:
    """A tree like the parameters of a model, each leaf made from the names of its axes in the annotations above."""

    def of(annotation: Any) -> Any:
        if hasattr(annotation, "_fields"):
            return annotation(*map(of, annotation.__annotations__.values()))
        return leaf([axis for axis in annotation.dim_str.split() if axis != "*layers"])

    embed, norm = of(Params.__annotations__["embed"]), of(Params.__annotations__["norm"])
    return Params(embed, (of(Block),) * config.layers, norm, None if config.tied else embed)


def shapes(config: Config) -> Params:
    """Every parameter's shape: an axis is as long as the `Config` field of its name says."""
    return by_axes(config, lambda axes: jax.ShapeDtypeStruct([getattr(config, axis) for axis in axes], jnp.float32))


def count(config: Config) -> int:
    """The exact number of parameters."""
    one = shapes(replace(config, layers=1))
    sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) for part in (one, one.blocks)]
    return sizes[0] + (config.layers - 1) * sizes[1]


def empty_cache(config: Config, ctx: int, dtype: Any) -> tuple[Cache, ...]:
    """A cache of ctx positions for every layer."""
    shape = (config.kv_heads, ctx, config.head_dim)
    return tuple(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def stack(layers: tuple[Any, ...]) -> Any:
    """The blocks in a tuple, or their caches, as one with a leading axis of layers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


# ---- 3. Functions of one vector --------------------------------------------------------------------------------------

BLOCK = 256  # keys per iteration of `attend`; half that for a single token, which then reads fewer unused positions


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x in float32; float64 stays as it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def rms_norm(x: Float[Array, " dim"], gain: Float[Array, " dim"], eps: float) -> Float[Array, " dim"]:
    """Scale x to unit root-mean-square, then by a learned gain.

        yᵢ = gᵢ xᵢ / √(ε + ¹⁄ₙ Σⱼ xⱼ²)

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. (4). ε is not in the paper.
    """
    return (wide(gain) * wide(x) * lax.rsqrt(eps + jnp.mean(wide(x) ** 2))).astype(x.dtype)


def rope_frequencies(config: Config) -> Float[Array, " pairs"]:
    """The angle in radians by which each pair turns from one position to the next.

        fᵢ = θ^(−2i/d);  with scaling  κᵢ fᵢ + (1 − κᵢ) fᵢ / s

    Su et al. 2021, arXiv:2104.09864, eq. (15). κ = 0 is linear interpolation, Chen et al. 2023, arXiv:2306.15595,
    eq. (4); llama3's κ is from Meta's code for Llama 3.1; yarn: Peng et al. 2023, arXiv:2309.00071, §3.2, with the ramp
    over i as in the authors' code, not over wavelengths as in the paper.
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
    """Each pair's angle at position m: m fᵢ radians, in float32 or wider whatever the dtype of the parameters."""
    return (f := rope_frequencies(config)) * position.astype(f.dtype)


def rope(x: Float[Array, " head_dim"], angles: Float[Array, " pairs"]) -> Float[Array, " head_dim"]:
    """Rotate each pair in its plane, so that ⟨rope(q, mf), rope(k, nf)⟩ depends on m − n alone.

        (a, b) ↦ (a cos φ − b sin φ, a sin φ + b cos φ)

    Su et al. 2021, arXiv:2104.09864, eq. (34).
    """
    a, b = wide(x).reshape(-1, 2).T
    cos, sin = jnp.cos(angles).astype(a.dtype), jnp.sin(angles).astype(a.dtype)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def softmax(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """exp(xᵢ) / Σⱼ exp(xⱼ). Subtracting the maximum cancels in the ratio and keeps exp finite."""
    weights = jnp.exp(wide(scores) - wide(scores).max())
    return (weights / weights.sum()).astype(scores.dtype)


def attend(
    q: Float[Array, " head_dim"], keys: Float[Array, "ctx head_dim"], values: Float[Array, "ctx head_dim"],
    position: Position, filled: Position | None = None, size: int = BLOCK,
) -> Float[Array, " head_dim"]:  # fmt: skip
    """Average the values up to the query's position, weighted by how well their keys match the query.

        softmax(q Kᵀ / √d) V,  over the keys at positions ≤ the query's

    Vaswani et al. 2017, arXiv:1706.03762, eq. (1), as an online softmax over blocks of `size` keys: Milakov &
    Gimelshein 2018, arXiv:1805.02867, alg. 3; Rabe & Staats 2021, arXiv:2112.05682, §2. Only positions below `filled`
    hold keys; blocks beyond are not read. With a Python int for `filled`, or None for all, the loop is differentiable;
    with an array it is not.
    """
    (ctx, head_dim), size = keys.shape, min(size, len(keys))

    def fold(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = state
        first = jnp.minimum(i * size, ctx - size)  # the last block may overlap the one before
        at = first + jnp.arange(size)
        k, v = (wide(lax.dynamic_slice_in_dim(rows, first, size)) for rows in (keys, values))
        scores = jnp.where((i * size <= at) & (at <= position), wide(q) / math.sqrt(head_dim) @ k.T, -jnp.inf)
        # Any shift near the maximum cancels. `ceil` has zero derivative, so autodiff treats it as a constant.
        new_top = jnp.ceil(jnp.maximum(top, scores.max()))
        kept, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
        return new_top, kept * total + weights.sum(), kept * mixed + weights @ v

    zero = jnp.zeros_like(wide(q))
    blocks = ((ctx if filled is None else filled) + size - 1) // size
    _, total, mixed = lax.fori_loop(0, blocks, jax.checkpoint(fold), (zero[0] - jnp.inf, zero[0], zero))
    return (mixed / total).astype(q.dtype)


def silu(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """x σ(x). Hendrycks & Gimpel 2016, arXiv:1606.08415, §2. `logistic` and its derivative are finite at both ends."""
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
    """Each token attends to itself and those before it, with every query head; W_O mixes the results.

        headₕ = attend(R W_Qʰ x, R W_K x, W_V x),  y = W_O [head₁; …; headₙ]

    Vaswani et al. 2017, §3.2.2; query heads share keys and values as in Ainslie et al. 2023, arXiv:2305.13245, §2.2.
    YaRN's temperature, arXiv:2309.00071, §3.4, is applied to the query alone, squared.
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

    Touvron et al. 2023, arXiv:2302.13971, §2.2; norms come first, as in Xiong et al. 2020, arXiv:2002.04745, fig. 1(b).
    """

    def feed_forward(x: Float[Array, " dim"]) -> Float[Array, " dim"]:
        return swiglu(rms_norm(x, w.ffn_norm, config.eps), *w.ffn)

    normed = vmap(lambda x: rms_norm(x, w.attn_norm, config.eps))(x)
    answer, cache = attention(w.attn, normed, angles, cache, start, config)
    x = x + answer
    return x + vmap(feed_forward)(x), cache


def fold_layers(
    layer: Callable[[Any, Any, Any], Any], x: Float[Array, "seq dim"], blocks: tuple[Block, ...] | Block, cache: Caches
) -> tuple[Float[Array, "seq dim"], Caches]:
    """Send x through the layers: by a loop over a tuple, by a scan, compiled once, over stacked ones."""
    if isinstance(blocks, Block):
        return lax.scan(lambda x, both: layer(x, *both), x, (blocks, cache))
    caches: list[Cache] = []
    for w, old in zip(blocks, cache, strict=True):
        x, new = layer(x, w, old)
        caches.append(new)
    return x, tuple(caches)


def embed_tokens(
    params: Params, tokens: Int[Array | np.ndarray, " seq"], start: Position, config: Config
) -> tuple[Float[Array, "seq dim"], Float[Array, "seq pairs"]]:
    """The layers' input: each token's row of E, and the rotary angles of positions start, start + 1, …"""
    return params.embed[tokens], vmap(lambda i: rope_angles(start + i, config))(jnp.arange(len(tokens)))


# What a layer stores for its derivative: its products with weights, of size seq. The rest is cheap to recompute, and
# attention's scores, of size seq², are never all in memory. A checkpointed layer is also traced once for all layers.
STORED = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def hidden_states(
    params: Params, tokens: Int[Array, " seq"], cache: Caches, start: Position, config: Config
) -> tuple[Float[Array, "seq dim"], Caches]:
    """The output of the last layer for tokens at positions start, start + 1, …: `llama` without its `readout`."""
    x, angles = embed_tokens(params, tokens, start, config)
    layer = jax.checkpoint(lambda x, w, cache: block(w, x, angles, cache, start, config), policy=STORED)
    return fold_layers(layer, x, params.blocks, cache)


def readout(params: Params, x: Float[Array, " dim"], config: Config) -> Float[Array, " vocab"]:
    """The next token's logits: ⟨norm(x), Uₜ⟩ for each token t. A tied model has U = E, arXiv:1608.05859."""
    unembed = params.embed if params.unembed is None else params.unembed
    return jnp.inner(rms_norm(x, params.norm, config.eps), unembed)  # under vmap a row per token, as `loss` reads them


def llama(
    params: Params, tokens: Int[Array, " seq"], cache: Caches, start: Position, config: Config
) -> tuple[Float[Array, "seq vocab"], Caches]:
    """The model: the logits after each of the tokens at positions start, start + 1, …, and the cache with them added.

    With a Python int for `start` the result is differentiable; with an array it is not, and reads only what is filled.
    The caller ensures ids below vocab and room for start + seq positions: nothing in here can raise.
    """
    x, cache = hidden_states(params, tokens, cache, start, config)
    return vmap(lambda x: readout(params, x, config))(x), cache


def logits(params: Params, tokens: Int[Array, " seq"], config: Config) -> Float[Array, "seq vocab"]:
    """`llama` from position 0, without the cache."""
    caches = empty_cache(config, len(tokens), params.embed.dtype)
    cache = vmap(lambda _: caches[0])(params.blocks.attn_norm) if isinstance(params.blocks, Block) else caches
    return llama(params, tokens, cache, 0, config)[0]


# ---- 5. Initialisation -----------------------------------------------------------------------------------------------


def init(rng: Key[Array, ""], config: Config) -> Params:
    """Parameters to train from: gains 1, matrices normal with σ = 0.02, but o and down with σ = 0.02 / √(2 layers).

    Those two add to the residual stream, whose variance then does not grow with depth: Radford et al. 2019, §2.3.
    llama2.c scales up in place of down.
    """

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, rng: Key[Array, ""]) -> Array:
        if "norm" in path[-1].name:
            return jnp.ones(leaf.shape, leaf.dtype)
        σ = 0.02 / math.sqrt(2 * config.layers) if path[-1].name in ("o", "down") else 0.02
        return σ * jax.random.normal(rng, leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten_with_path(shapes(config))
    rngs = jax.random.split(rng, len(leaves))
    return tree.unflatten([draw(*leaf, own) for leaf, own in zip(leaves, rngs, strict=True)])


# ---- 6. Learning -----------------------------------------------------------------------------------------------------


def loss(
    params: Params, tokens: Int[Array, "*batch seq"], targets: Int[Array, "*batch seq"], config: Config
) -> Float[Array, ""]:
    """Mean cross-entropy in nats: −¹⁄ₙ Σ log softmax(logits)ₜ over the n targets t that are not negative.

    Negative targets (−1 by convention) are ignored; where all are, the loss is 0. Cross-entropy is Shannon 1948, §6,
    with the model's probabilities inside the logarithm.
    """

    def row(tokens: Int[Array, " seq"]) -> Float[Array, "seq vocab"]:
        return logits(params, tokens, config)

    scores = wide(vmap(row)(tokens.reshape(-1, tokens.shape[-1]))).reshape(-1, config.vocab)
    target, counts = targets.reshape(-1, 1), targets.reshape(-1) >= 0
    chosen = jnp.take_along_axis(scores, jnp.maximum(target, 0), axis=-1)[:, 0]
    surprise = jnp.where(counts, jax.nn.logsumexp(scores, axis=-1) - chosen, 0)
    return surprise.sum() / jnp.maximum(counts.sum(), 1).astype(surprise.dtype)


# ---- 7. Choosing -----------------------------------------------------------------------------------------------------
# A sampler maps logits to logits. It excludes a token by −∞, so samplers compose, and `softmax` ends any chain of them.


def repetition_penalty(
    logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"], penalty: float
) -> Float[Array, " vocab"]:
    """Divide the logits of tokens seen before by the penalty, or multiply them by it where they are negative.

    Keskar et al. 2019, arXiv:1909.05858, §4.1. The paper divides negative logits too, which rewards repetition.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Float[Array, " vocab"], t: float) -> Float[Array, " vocab"]:
    """xᵢ / t, shifted so that the largest is 0. Ackley, Hinton & Sejnowski 1985, Cognitive Science 9, eq. (5).

    t = 0 is the limit: only the largest remain.
    """
    below = logits - logits.max()
    return jnp.where(below == 0, below, below / t)


def ranks(logits: Float[Array, " vocab"]) -> Int[Array, " vocab"]:
    """0 for the likeliest token, 1 for the next, …; between equals the lower id comes first."""
    return jnp.argsort(jnp.argsort(-logits, stable=True))


def greedy(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    """Keep the likeliest token alone; between equals the lowest id."""
    return jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), logits, -jnp.inf)


def top_k(logits: Float[Array, " vocab"], k: int) -> Float[Array, " vocab"]:
    """Keep exactly k likeliest tokens; between equals the lower ids. Fan et al. 2018, arXiv:1805.04833, §5.4."""
    return jnp.where(ranks(logits) < k, logits, -jnp.inf)


def top_p(logits: Float[Array, " vocab"], p: float) -> Float[Array, " vocab"]:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least p.

    Holtzman et al. 2019, arXiv:1904.09751, eq. (2). The likeliest always remains, and p = 1 keeps all.
    """
    rank = ranks(logits)
    descending = softmax(logits)[jnp.argsort(rank)]
    before = jnp.cumsum(descending) - descending
    return jnp.where((before[rank] < p) | (rank == 0) | (p >= 1), logits, -jnp.inf)


def min_p(logits: Float[Array, " vocab"], p: float) -> Float[Array, " vocab"]:
    """Keep tokens at least p times as likely as the likeliest. Nguyen et al. 2024, arXiv:2407.01082, §3.1."""
    return jnp.where(softmax(logits) >= p * softmax(logits).max(), logits, -jnp.inf)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the samplers above in this order, each skipped at the value that changes nothing.

    The defaults are those of Meta's generation.py. Hashable, so that `choose` is compiled once for each.
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
        """Refuse values for which a sampler is not defined."""
        penalty, k = self.repetition_penalty, self.top_k
        check("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number above 0")
        check("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number of at least 0")
        check("top_k", k, k is None or (type(k) is int and 1 <= k <= vocab), f"a whole number from 1 to {vocab}")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, at most 1")
        check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")


@partial(jax.jit, static_argnames="sampling")
def choose(
    rng: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"],
    sampling: Sampling,
) -> tuple[Int[Array, ""], Bool[Array, " vocab"]]:  # fmt: skip
    """Draw the token for a position and mark it as seen; −1 where a logit, or its penalised value, is not finite."""
    token = jax.random.categorical(jax.random.fold_in(rng, position), sampling(logits, seen))
    finite = jnp.isfinite(repetition_penalty(wide(logits), seen, sampling.repetition_penalty)).all()
    token = jnp.where(finite, token, -1)
    return token, seen.at[token].set(True, mode="drop")


# ---- 8. Devices ------------------------------------------------------------------------------------------------------

# The mesh axis over which an axis of a parameter is split. "tensor" divides each product of a layer, Shoeybi et al.
# 2019, arXiv:1909.08053, §3; "fsdp" stores each matrix in parts, Rajbhandari et al. 2019, arXiv:1910.02054, §5 (ZeRO).
RULES = {"vocab": "tensor", "kv_heads": "tensor", "hidden_dim": "tensor", "dim": "fsdp"}


def specs(config: Config) -> Params:
    """Every parameter's partition over a mesh with axes "tensor" and "fsdp", read off its annotation.

    With parameters placed so, XLA's partitioner derives all communication: Xu et al. 2021, arXiv:2105.04663. Each
    axis must be divisible by the mesh axis that splits it.
    """
    return by_axes(config, lambda axes: PartitionSpec(*map(RULES.get, axes)))


# ---- 9. Properties ---------------------------------------------------------------------------------------------------
# What holds for any Llama, to call on your own. A model is a function from token ids to logits, (seq) to (seq, vocab),
# in arrays that numpy can read. A check returns None, or raises AssertionError saying where the property fails.

Logits = Callable[[Any], Any]


def same(got: Any, want: Any, bound: float, what: str) -> None:
    """Fail unless ‖got − want‖ ≤ bound ‖want‖; with a bound of 0, unless all values are equal."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert a.shape == b.shape, f"{what}: got shape {a.shape}, expected {b.shape}"
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    assert error <= bound, f"{what}: got a relative error of {error:.1e}, expected at most {bound:.0e}"


def check_causality(model: Logits, tokens: Any, vocab: int) -> None:
    """Another token at t leaves all logits before t bit for bit the same, and changes those at t."""
    tokens = np.array(tokens)
    want = np.asarray(model(tokens))
    for t in range(len(tokens)):
        other = tokens.copy()
        other[t] = (tokens[t] + 1) % vocab
        got = np.asarray(model(other))
        same(got[:t], want[:t], 0.0, f"logits before a change at {t}")
        assert (got[t] != want[t]).any(), f"logits at a change at {t}: got the same, expected a change"


def check_cache(step: Callable[[Any, Any], tuple[Any, Any]], model: Logits, tokens: Any, bound: float) -> None:
    """A prefill followed by decoding token by token gives the logits of the whole, for every length of the prefill.

    `step(tokens, cache)` returns logits and a cache, and takes None for an empty cache.
    """
    tokens = np.asarray(tokens)
    want = np.asarray(model(tokens))
    for cut in range(1, len(tokens)):
        logits, cache = step(tokens[:cut], None)
        same(logits, want[:cut], bound, f"logits of a prefill of {cut}")
        for t in range(cut, len(tokens)):
            logits, cache = step(tokens[t : t + 1], cache)
            same(np.asarray(logits)[-1], want[t], bound, f"logits at {t} after a prefill of {cut}")


def check_rows(
    rows: Callable[[Sequence[Any]], Sequence[Any]], model: Logits, tokens: Sequence[Any], bound: float
) -> None:
    """Rows of unequal lengths run as one batch, in either order, have the logits they have alone."""
    want = [model(np.asarray(row)) for row in tokens]
    for order in (slice(None), slice(None, None, -1)):
        for got, alone, row in zip(rows(tokens[order]), want[order], tokens[order], strict=True):
            same(got, alone, bound, f"logits of the row of {len(row)}")


def check_rotation(rotate: Callable[[Any, int], Any], head_dim: int, bound: float) -> None:
    """`rotate(x, position)` keeps norms, is the identity at 0, and gives products that depend on distance alone."""
    q, k = np.random.default_rng(0).normal(size=(2, head_dim)).astype(np.float32)
    same(rotate(q, 0), q, bound, "a vector rotated at 0")
    same(np.linalg.norm(rotate(q, 77)), np.linalg.norm(q), bound, "a norm at 77")
    for distance in (0, 1, 63, 300):
        want = np.dot(rotate(q, distance), rotate(k, 0))
        for position in (1, 64, 500):
            got = np.dot(rotate(q, position + distance), rotate(k, position))
            scale = np.linalg.norm(q) * np.linalg.norm(k)
            same(got + scale, want + scale, bound, f"a product over distance {distance} at {position}")
    assert abs(np.dot(rotate(q, 1), rotate(k, 0)) - np.dot(q, k)) > bound, "a product over distance 1: got that over 0"


def check_heads(
    model: Callable[[Params, Config, Any], Any], params: Params, config: Config, tokens: Any, bound: float
) -> None:
    """`model(params, config, tokens)` gives the same with keys and values repeated for every query head, as in MHA.

    And with the heads in another order. Your own model takes the parameters through `to_hf` or `to_llama2c`, which
    stand in lovely_llama_tools.
    """
    want = model(params, config, tokens)

    def each(change: Callable[[Attention], Attention]) -> Params:
        blocks = tuple(block._replace(attn=change(block.attn)) for block in cast(tuple[Block, ...], params.blocks))
        return params._replace(blocks=blocks)

    def repeated(w: Attention) -> Attention:
        k, v = (jnp.repeat(rows, config.q_per_kv, axis=0) for rows in (w.k, w.v))
        q, o = w.q.reshape(len(k), 1, *w.q.shape[2:]), w.o.reshape(len(w.o), len(k), 1, -1)
        return Attention(q, k, v, o)

    ungrouped = replace(config, kv_heads=config.kv_heads * config.q_per_kv, q_per_kv=1)
    same(model(each(repeated), ungrouped, tokens), want, bound, "keys and values repeated for every query head")
    reverse = each(lambda w: Attention(w.q[::-1], w.k[::-1], w.v[::-1], w.o[:, ::-1]))
    same(model(reverse, config, tokens), want, bound, "key/value heads in another order")
    within = each(lambda w: w._replace(q=w.q[:, ::-1], o=w.o[:, :, ::-1]))
    same(model(within, config, tokens), want, bound, "query heads in another order")
