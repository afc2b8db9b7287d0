"""Llama as mathematics: one file of pure JAX that reads like the papers.

Functions are written for one token, one head or one vector; `vmap` adds the other axes. Shapes stand in the signatures,
where an axis has one name everywhere. The length of each of these is the `Config` field of that name:

    vocab     size of the vocabulary                    dim         width of the residual stream
    kv_heads  key/value heads                           q_per_kv    query heads that share one of them
    head_dim  width of a head                           hidden_dim  width inside the feed-forward
    layers    blocks, each fed by the one before

Others depend on the call: `ctx`, positions of a cache (`config.ctx`: the most a model is meant for); `seq`, tokens;
`pairs`, head_dim / 2 planes of rotation; `n`, any number; `batch`, sequences; an adapter's `rank`, `inputs`, `outputs`.

Matrices are stored [out, in] and applied as W @ x. A rotary pair is two neighbouring rows, as in Meta's and llama2.c's
checkpoints. Positions are absolute and start at 0. The arithmetic inside norms, rotations, softmax, the loss, the
optimiser and the samplers is float32 or wider, whatever dtype comes in; results are cast back.

Llama: Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Llama 3: Dubey et al. 2024, arXiv:2407.21783.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax import core, lax, vmap
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key

__version__ = "0.1.0"
Number = float | int | Float[Array, ""] | Int[Array, ""]
Ids = Integer[Array | np.ndarray, " seq"]
Logits = Float[Array, " vocab"]
GAINS = {"attn_norm", "ffn_norm", "norm"}  # the fields that hold gains: 1 at first, and spared by weight decay


# ---- 1. Nouns: the configuration, the parameters, the cache, the positions -------------------------------------------
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
    """All hyperparameters, checked when it is made. Hashable, hence a valid static argument of `jit`; no defaults."""

    vocab: int
    dim: int
    layers: int
    kv_heads: int
    q_per_kv: int
    head_dim: int
    hidden_dim: int
    ctx: int
    eps: float | int
    theta: float | int
    rope_scaling: RopeScaling | None
    tied: bool

    def __post_init__(self) -> None:
        check_config(self)
        for field in SIZES:  # Python's integers, as numpy's can overflow
            object.__setattr__(self, field, int(getattr(self, field)))


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
    """One layer. Only the tools stack several of them on a leading axis."""

    attn_norm: Float[Array, "*layers dim"]
    attn: Attention
    ffn_norm: Float[Array, "*layers dim"]
    ffn: FeedForward


class Params(NamedTuple):
    """A whole model."""

    embed: Float[Array, "vocab dim"]
    blocks: tuple[Block, ...]
    norm: Float[Array, " dim"]
    unembed: Float[Array, "vocab dim"] | None  # None in a tied model, where embed serves for both


class Cache(NamedTuple):
    """What a layer remembers of the tokens so far."""

    keys: Float[Array, "*layers kv_heads ctx head_dim"]
    values: Float[Array, "*layers kv_heads ctx head_dim"]


class Positions(NamedTuple):
    """What depends on the positions of a call's tokens, and is the same in every layer."""

    start: Number  # of the first token
    first: Int[Array, " seq"]  # the first position that each token sees: in a packed row, where its document begins
    angles: Float[Array, "seq pairs"]
    query_scale: Float[Array, ""] | float  # YaRN's 1/t


# ---- 2. Functions of one vector --------------------------------------------------------------------------------------
def float32_or_wider(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32; float64 stays as it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def rms_norm(x: Float[Array, " dim"], gain: Float[Array, " dim"], eps: Number) -> Float[Array, " dim"]:
    """Scale x to unit root-mean-square, then by a learned gain.

        yᵢ = gᵢ xᵢ / √(ε + ¹⁄ₙ Σⱼ xⱼ²)

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. (4). ε is not in the paper."""
    x32 = float32_or_wider(x)
    y = float32_or_wider(gain) * x32 * lax.rsqrt(eps + jnp.mean(x32**2))
    return y.astype(x.dtype)


def rope_frequencies(config: Config) -> Float[Array, " pairs"]:
    """The angle in radians by which each pair turns from one position to the next.

        fᵢ = θ^(−2i/d);  with scaling  κᵢ fᵢ + (1 − κᵢ) fᵢ / s

    Su et al. 2021, arXiv:2104.09864, after eq. (15). κ = 0 is linear interpolation, Chen et al. 2023, arXiv:2306.15595,
    eq. (4); llama3's κ is from Meta's code for Llama 3.1; yarn: Peng et al. 2023, arXiv:2309.00071, §3.2, with the ramp
    over i as in the authors' code, not over wavelengths as in the paper."""
    scaling = config.rope_scaling or RopeScaling("linear", 1.0)
    i = np.arange(config.head_dim // 2)
    f = 1 / config.theta ** (2 * i / config.head_dim)
    κ = np.zeros_like(f)
    if scaling.kind == "llama3":
        κ = (scaling.original_ctx * f / (2 * math.pi) - scaling.low) / (scaling.high - scaling.low)
    if scaling.kind == "yarn":
        positions_per_radian = [scaling.original_ctx / (2 * math.pi * turns) for turns in (scaling.high, scaling.low)]
        fast, slow = (config.head_dim * math.log(n) / (2 * math.log(config.theta)) for n in positions_per_radian)
        begin = max(math.floor(fast), 0)
        end = min(math.ceil(slow), config.head_dim - 1)
        κ = 1 - (i - begin) / (end - begin or 1e-3)
    κ = np.clip(κ, 0, 1)
    return jnp.asarray(κ * f + (1 - κ) * (f / scaling.factor))


def rope_angles(position: Int[Array, ""] | int, config: Config) -> Float[Array, " pairs"]:
    """Each pair's angle at position m: m fᵢ radians, in float32 or wider whatever the dtype of the parameters."""
    f = rope_frequencies(config)
    return f * jnp.asarray(position, f.dtype)


def rope(x: Float[Array, " head_dim"], angles: Float[Array, " pairs"]) -> Float[Array, " head_dim"]:
    """Rotate each pair in its plane, so that ⟨rope(q, mf), rope(k, nf)⟩ depends on m − n alone.

        (a, b) ↦ (a cos φ − b sin φ, a sin φ + b cos φ)

    Su et al. 2021, arXiv:2104.09864, eq. (34)."""
    a, b = float32_or_wider(x).reshape(-1, 2).T
    cos, sin = jnp.cos(angles).astype(a.dtype), jnp.sin(angles).astype(a.dtype)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def softmax(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """exp(xᵢ) / Σⱼ exp(xⱼ). Subtracting the maximum cancels in the ratio and keeps exp finite."""
    x = float32_or_wider(scores)
    weights = jnp.exp(x - x.max())
    return (weights / weights.sum()).astype(scores.dtype)


def attend(
    q: Float[Array, " head_dim"], keys: Float[Array, "ctx head_dim"], values: Float[Array, "ctx head_dim"],
    last: Number, first: Number = 0,
) -> Float[Array, " head_dim"]:  # fmt: skip
    """Average the values at positions first … last, weighted by how well their keys match the query.

        softmax(q Kᵀ / √d) V

    Vaswani et al. 2017, arXiv:1706.03762, eq. (1). A prompt of seq tokens has seq² · heads scores in memory, and its
    gradient those of every layer; lovely_llama_tools.fast computes the same a block of keys at a time."""
    position = jnp.arange(len(keys))
    visible = (first <= position) & (position <= last)
    scores = float32_or_wider(keys) @ float32_or_wider(q) / math.sqrt(len(q))
    weights = softmax(jnp.where(visible, scores, -jnp.inf))
    return (weights @ float32_or_wider(values)).astype(q.dtype)


def silu(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """x σ(x). Hendrycks & Gimpel 2016, arXiv:1606.08415, §2. `logistic` and its derivative are finite at both ends."""
    x32 = float32_or_wider(x)
    return (x32 * lax.logistic(x32)).astype(x.dtype)


def swiglu(
    x: Float[Array, " dim"], gate: Float[Array, "hidden_dim dim"], up: Float[Array, "hidden_dim dim"],
    down: Float[Array, "dim hidden_dim"],
) -> Float[Array, " dim"]:  # fmt: skip
    """The feed-forward layer: W₂ (silu(W x) ⊙ V x). Shazeer 2020, arXiv:2002.05202, eq. (6)."""
    return down @ (silu(gate @ x) * (up @ x))


# ---- 3. Assembly -----------------------------------------------------------------------------------------------------
def embed(params: Params, tokens: Ids) -> Float[Array, "seq dim"]:
    """The first layer's input: each token's row of E."""
    return jnp.asarray(params.embed)[tokens]


def positions(start: Number, seq: int, config: Config, first: Ids | int = 0) -> Positions:
    """What layers need about positions start, start + 1, … The scale of queries is YaRN's 1/t = attention_factor².

    Peng et al. 2023, arXiv:2309.00071, §3.4, where √(1/t) scales queries and keys; here keys stay as they are."""
    angles = vmap(lambda i: rope_angles(start + i, config))(jnp.arange(seq))  # adds seq
    query_scale = config.rope_scaling.attention_factor**2 if config.rope_scaling else 1.0
    return Positions(start, jnp.broadcast_to(first, seq), angles, query_scale)


def attention(
    w: Attention, x: Float[Array, "seq dim"], cache: Cache, where: Positions, *, attend: Callable[..., Any] = attend
) -> tuple[Float[Array, "seq dim"], Cache]:
    """Each token attends to those from `first` up to itself, with every query head; W_O mixes the results.

        headₕ = attend(s R W_Qʰ x, R W_K x, W_V x),  y = W_O [head₁; …; headₙ]

    Vaswani et al. 2017, §3.2.2, where s = 1; query heads share keys and values as in Ainslie et al. 2023,
    arXiv:2305.13245, §2.2."""

    def remember(w_k: Float[Array, "head_dim dim"], w_v: Float[Array, "head_dim dim"]) -> Cache:
        return vmap(lambda x, angles: Cache(rope(w_k @ x, angles), w_v @ x))(x, where.angles)  # adds seq

    def group(w_q: Float[Array, "q_per_kv head_dim dim"], own: Cache) -> Float[Array, "q_per_kv seq head_dim"]:
        def head(w_q: Float[Array, "head_dim dim"]) -> Float[Array, "seq head_dim"]:
            def token(x: Float[Array, " dim"], angles: Float[Array, " pairs"], last: Number, first: Number) -> Array:
                return attend(where.query_scale * rope(w_q @ x, angles), *own, last, first)

            return vmap(token)(x, where.angles, last, where.first)  # adds seq

        return vmap(head)(w_q)  # adds q_per_kv

    write = partial(lax.dynamic_update_slice_in_dim, start_index=where.start, axis=1)
    cache = jax.tree.map(write, cache, vmap(remember)(w.k, w.v))  # adds kv_heads
    last = where.start + jnp.arange(len(x))
    heads = jnp.moveaxis(vmap(group)(w.q, cache), 2, 0)  # adds kv_heads, and brings seq to the front
    return vmap(lambda heads: jnp.tensordot(w.o, heads, 3))(heads), cache  # adds seq


def block(
    w: Block, x: Float[Array, "seq dim"], cache: Cache, where: Positions, eps: Number, *,
    attention: Callable[..., Any] = attention,
) -> tuple[Float[Array, "seq dim"], Cache]:  # fmt: skip
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x)).

    Touvron et al. 2023, arXiv:2302.13971, §2.2; norms first, as in Xiong et al. 2020, arXiv:2002.04745, fig. 1(b)."""
    normed = vmap(lambda x: rms_norm(x, w.attn_norm, eps))(x)  # adds seq
    y, cache = attention(w.attn, normed, cache, where)
    x = x + y
    return x + vmap(lambda x: swiglu(rms_norm(x, w.ffn_norm, eps), *w.ffn))(x), cache  # adds seq


def readout(params: Params, x: Float[Array, " dim"], eps: Number) -> Float[Array, " vocab"]:
    """The next token's logits: ⟨norm(x), Uₜ⟩ for each token t. A tied model has U = E, arXiv:1608.05859."""
    unembed = params.embed if params.unembed is None else params.unembed
    return jnp.inner(rms_norm(x, params.norm, eps), unembed)


def empty_cache(config: Config, ctx: int, dtype: Any) -> tuple[Cache, ...]:
    """A cache of ctx positions for every layer."""
    return tuple(Cache(*jnp.zeros((2, config.kv_heads, ctx, config.head_dim), dtype)) for _ in range(config.layers))


def llama(
    params: Params, tokens: Ids | Sequence[int], cache: tuple[Cache, ...], start: Number, config: Config,
    first: Ids | int = 0,
) -> tuple[Float[Array, "seq vocab"], tuple[Cache, ...]]:  # fmt: skip
    """The model: the logits after each of the tokens at positions start, start + 1, …, and the cache with them added.

    Of what `jit` traces the values cannot be checked: ids must be valid, and the cache have room for them."""
    ids = checked_tokens(params, tokens, cache, start, config, first)
    where = positions(start, len(ids), config, first)
    x = embed(params, ids)
    caches = list[Cache]()
    for w, old in zip(params.blocks, cache, strict=True):
        x, new = block(w, x, old, where, config.eps)
        caches.append(new)
    return vmap(lambda x: readout(params, x, config.eps))(x), tuple(caches)  # adds seq


def logits(
    params: Params, tokens: Ids | Sequence[int], config: Config, first: Ids | int = 0
) -> Float[Array, "seq vocab"]:
    """`llama` from position 0, without the cache."""
    cache = empty_cache(config, np.size(tokens), jnp.result_type(params.embed))
    return llama(params, tokens, cache, 0, config, first)[0]


# ---- 4. Initialisation -----------------------------------------------------------------------------------------------
def axes(config: Config) -> Params:
    """The names of every parameter's axes, as one string each, read off the annotations in part 1."""

    def of(annotation: Any) -> Any:
        if hasattr(annotation, "_fields"):
            return annotation(*map(of, annotation.__annotations__.values()))
        return annotation.dim_str.removeprefix("*layers").strip()

    embed = of(Params.__annotations__["embed"])
    norm = of(Params.__annotations__["norm"])
    return Params(embed, (of(Block),) * config.layers, norm, None if config.tied else embed)


def shapes(config: Config) -> Params:
    """Every parameter's shape: an axis is as long as the `Config` field of its name says."""

    def of(names: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([getattr(config, axis) for axis in names.split()], jnp.float32)

    return jax.tree.map(of, axes(config))


def count(config: Config) -> int:
    """The exact number of parameters. One layer stands for all, of which a file may claim billions."""
    one = shapes(replace(config, layers=1))
    whole, layer = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (one, one.blocks))
    return whole + (config.layers - 1) * layer


def init(rng: Key[Array, ""], config: Config) -> Params:
    """Parameters to train from: gains 1, matrices normal with σ = 0.02, but o and down with σ = 0.02 / √(2 layers).

    Those two add to the residual stream, whose variance then does not grow with depth: Radford et al. 2019, §2.3."""

    def new(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, rng: Key[Array, ""]) -> Array:
        if path[-1].name in GAINS:
            return jnp.ones(leaf.shape, leaf.dtype)
        σ = 0.02 / math.sqrt(2 * config.layers) if path[-1].name in ("o", "down") else 0.02
        return σ * jax.random.normal(rng, leaf.shape, leaf.dtype)

    wanted = shapes(config)
    tree = jax.tree.structure(wanted)
    return jax.tree.map_with_path(new, wanted, tree.unflatten(jax.random.split(rng, tree.num_leaves)))


# ---- 5. Learning -----------------------------------------------------------------------------------------------------
Batch = Integer[Array | np.ndarray, "*batch seq"]


def cross_entropy(logits: Float[Array, "*batch seq vocab"], targets: Batch) -> Float[Array, ""]:
    """Mean cross-entropy in nats: −¹⁄ₙ Σ log softmax(logits)ₜ over the n targets t that are not negative.

    Negative targets (−1 by convention) are ignored; where all are, it is 0. Shannon 1948, §6, with the model's
    probabilities inside the logarithm, which is log Σⱼ exp(xⱼ) − xₜ."""
    check("targets", targets.shape, targets.shape == logits.shape[:-1], f"{logits.shape[:-1]}, as logits")
    scores = float32_or_wider(logits).reshape(-1, logits.shape[-1])
    counted = targets.reshape(-1) >= 0
    chosen = jnp.take_along_axis(scores, jnp.maximum(targets.reshape(-1, 1), 0), axis=-1)[:, 0]
    surprise = jnp.where(counted, jax.nn.logsumexp(scores, axis=-1) - chosen, 0)
    return surprise.sum() / jnp.maximum(counted.sum(), 1).astype(surprise.dtype)


def loss(params: Params, tokens: Batch, targets: Batch, config: Config, first: Batch | int = 0) -> Float[Array, ""]:
    """`cross_entropy` of the model's logits. Documents packed into one row do not see each other: a token's own begins
    at `first`."""
    ids, answers = checked_batch(tokens, targets, config, first)
    rows = ids.reshape(-1, ids.shape[-1])
    firsts = jnp.broadcast_to(first, ids.shape).reshape(rows.shape)
    scores = vmap(lambda tokens, first: logits(params, tokens, config, first))(rows, firsts)  # adds batch
    return cross_entropy(scores, answers.reshape(rows.shape))


def clip(gradients: Any, limit: Number) -> tuple[Any, Float[Array, ""]]:
    """g · min(1, limit / ‖g‖), and ‖g‖, the norm over all leaves. Pascanu et al. 2013, arXiv:1211.5063, algorithm 1."""
    wide = jax.tree.map(float32_or_wider, gradients)
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda g: abs(g).max(), wide))
    _, e = jnp.frexp(largest)  # 2ᵉ cancels; without it, squares overflow
    norm = jnp.ldexp(jnp.sqrt(sum((jnp.ldexp(g, -e) ** 2).sum() for g in jax.tree.leaves(wide))), e)
    return jax.tree.map(lambda g, w: (jnp.minimum(1, limit / norm) * w).astype(g.dtype), gradients, wide), norm


class Moments(NamedTuple):
    """What AdamW remembers: steps taken, and running means of gradients and of their squares."""

    step: Int[Array, ""]
    first: Any
    second: Any


def moments(params: Any) -> Moments:
    """The moments before the first step: zeros, in float32 or wider."""
    first, second = (jax.tree.map(lambda θ: jnp.zeros_like(float32_or_wider(θ)), params) for _ in range(2))
    return Moments(jnp.array(0), first, second)


def adamw(
    params: Any, gradients: Any, moments: Moments, rate: Number, decay: Number,
    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
) -> tuple[Any, Moments]:  # fmt: skip
    """One step of Adam with decoupled weight decay. Gains, recognised by their names in the tree, do not decay.

        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  θ ← θ − η (m̂/(√v̂ + ε) + λθ),  m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ)

    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, but with λ multiplied by η, as in torch."""
    β1, β2 = betas
    step = moments.step + 1
    correction1, correction2 = (1 - jnp.asarray(β) ** step for β in betas)

    def update(path: tuple[Any, ...], *given: Array) -> tuple[Array, ...]:
        θ, m, v, g = map(float32_or_wider, given)
        λ = 0 if jax.tree_util.keystr(path[-1:], simple=True) in GAINS else decay
        m = β1 * m + (1 - β1) * g
        v = β2 * v + (1 - β2) * g**2
        m_hat = m / correction1.astype(m.dtype)
        v_hat = v / correction2.astype(v.dtype)
        θ = θ - jnp.asarray(rate, θ.dtype) * (m_hat / (jnp.sqrt(v_hat) + eps) + λ * θ)
        return tuple(new.astype(old.dtype) for new, old in zip((θ, m, v), given[:3], strict=True))

    updated = jax.tree.map_with_path(update, params, moments.first, moments.second, gradients)
    params, first, second = jax.tree.transpose(jax.tree.structure(params), None, updated)
    return params, Moments(step, first, second)


def learning_rate(step: int, peak: float | int, warmup: int, steps: int, final: float | int) -> float | int:
    """The rate of a step, counted from 0: linear up to peak at `warmup`, then half a cosine down to final at `steps`.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. (5), without restarts; the warm-up begins at 0, as in llama2.c."""
    if step < warmup:
        return peak * step / warmup
    turn = (min(step, steps) - warmup) / max(steps - warmup, 1)
    return final + 0.5 * (1 + math.cos(math.pi * turn)) * (peak - final)


class Adapter(NamedTuple):
    """A change BA of low rank to a matrix, with the axes of the matrix: those of its input in a, of its output in b."""

    a: Float[Array, "rank *inputs"]
    b: Float[Array, "*outputs rank"]


def adapt(params: Any, adapters: Any, scale: Number) -> Any:
    """Parameters with W + s BA for each W that has an `Adapter` in the tree `adapters`, which has None elsewhere.

    Hu et al. 2021, arXiv:2106.09685, eq. (3), s = α/r. Only the adapters are trained."""

    def product(a: Array, b: Array) -> Array:
        return jnp.tensordot(float32_or_wider(b), float32_or_wider(a), 1)

    def changed(adapter: Adapter | None, w: Any) -> Any:
        return w if adapter is None else (float32_or_wider(w) + scale * product(*adapter)).astype(w.dtype)

    return jax.tree.map(changed, adapters, params, is_leaf=lambda node: node is None or isinstance(node, Adapter))


# ---- 6. Choosing -----------------------------------------------------------------------------------------------------
# A sampler maps logits to logits. It excludes a token by −∞, so samplers compose, and `softmax` ends any chain of them.
def repetition_penalty(logits: Logits, seen: Bool[Array, " vocab"], penalty: Number) -> Logits:
    """Divide the logits of tokens seen before by the penalty, or multiply them by it where they are negative.

    Keskar et al. 2019, arXiv:1909.05858, §4.1. The paper divides negative logits too, which rewards repetition."""
    x = float32_or_wider(logits)
    return jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x).astype(logits.dtype)


def temperature(logits: Logits, t: Number) -> Logits:
    """(xᵢ − maxⱼ xⱼ) / t; at t = 0 only the largest remain. Ackley et al. 1985, Cognitive Science 9, eq. (6)."""
    below = float32_or_wider(logits) - float32_or_wider(logits.max())
    return jnp.where(below == 0, below, below / t).astype(logits.dtype)


def greedy(logits: Logits) -> Logits:
    """Keep the most likely token alone; between equals the lowest id."""
    return jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), logits, -jnp.inf)


def top_k(logits: Logits, k: Number) -> Logits:
    """Keep exactly the k most likely tokens; between equals the lower ids. Fan et al. 2018, arXiv:1805.04833, §5.4."""
    order = jnp.argsort(-logits)  # which is stable
    place = jnp.argsort(order)
    return jnp.where(place < k, logits, greedy(logits))


def top_p(logits: Logits, p: Number) -> Logits:
    """Keep the smallest set of most likely tokens whose probabilities sum to at least p.

    Holtzman et al. 2019, arXiv:1904.09751, eq. (2). The most likely always remains, and p = 1 keeps all."""
    probabilities = softmax(float32_or_wider(logits))[jnp.argsort(-logits)]
    below_p = jnp.cumsum(probabilities) < p  # of each token together with all more likely ones
    return top_k(logits, jnp.where(p >= 1, len(logits), 1 + below_p.sum()))


def min_p(logits: Logits, p: Number) -> Logits:
    """Keep tokens at least p times as likely as the most likely. Nguyen et al. 2024, arXiv:2407.01082."""
    probabilities = softmax(float32_or_wider(logits))
    return jnp.where(probabilities >= p * probabilities.max(), logits, greedy(logits))


def categorical(rng: Key[Array, ""], logits: Logits) -> Int[Array, ""]:
    """A token with the probabilities softmax(logits): the first whose cumulative probability exceeds a uniform number.

    Inverse transform sampling: Devroye 1986, Non-Uniform Random Variate Generation, chapter III."""
    cumulative = jnp.cumsum(softmax(float32_or_wider(logits)))
    u = jax.random.uniform(rng, dtype=cumulative.dtype) * cumulative[-1]
    return jnp.argmax(cumulative > u)


SAMPLERS: dict[str, Callable[[Array, Array, Any], Array]] = {
    "repetition_penalty": repetition_penalty,
    "temperature": lambda x, _, t: jnp.where(t == 0, greedy(x), temperature(x, t)),
    "top_k": lambda x, _, k: top_k(x, k),
    "top_p": lambda x, _, p: top_p(x, p),
    "min_p": lambda x, _, p: min_p(x, p),
}


class Sampling(NamedTuple):
    """How a token is chosen: by the samplers of the table above, in its order. None leaves one out.

    The defaults are those of Meta's generation.py. As a tree of numbers and Nones it goes through `jit`, which compiles
    anew for another set of samplers, not for other numbers."""

    repetition_penalty: float | None = None
    temperature: float | None = 0.6
    top_k: int | None = None
    top_p: float | None = 0.9
    min_p: float | None = None

    def __call__(self, logits: Logits, seen: Bool[Array, " vocab"], samplers: Mapping[str, Any] = SAMPLERS) -> Logits:
        logits = float32_or_wider(logits)
        for name, value in self._asdict().items():
            logits = logits if value is None else samplers[name](logits, seen, value)
        return logits


def choose(
    rng: Key[Array, ""], position: Int[Array, ""], logits: Logits, seen: Bool[Array, " vocab"],
    sampling: Sampling, *, samplers: Mapping[str, Any] = SAMPLERS, draw: Callable[..., Any] = categorical,
) -> tuple[Int[Array, ""], Bool[Array, " vocab"]]:  # fmt: skip
    """Draw the token for a position and mark it as seen; −1 where a logit, or its penalised value, is not finite."""
    penalised = Sampling(sampling.repetition_penalty, None, None, None, None)(logits, seen, samplers)
    drawn = draw(jax.random.fold_in(rng, position), sampling(logits, seen, samplers))
    token = jnp.where(jnp.isfinite(penalised).all(), drawn, -1)
    return token, seen | (jnp.arange(len(seen)) == token)


# ---- 7. Checks -------------------------------------------------------------------------------------------------------
SIZES = ("vocab", "dim", "layers", "kv_heads", "q_per_kv", "head_dim", "hidden_dim", "ctx")  # of a `Config`
LIMITS = {  # of the samplers: from a lower bound or above it, up to an upper one; None: a whole number up to vocab
    "repetition_penalty": ("above", 0, math.inf),
    "temperature": ("from", 0, math.inf),
    "top_k": ("from", 1, None),
    "top_p": ("above", 0, 1),
    "min_p": ("from", 0, 1),
}


class LlamaError(ValueError):
    """Bad input. Its one line reads `file: field: got …, expected …`."""

    def __init__(self, file: object, field: str, got: object, expected: object) -> None:
        self.file, self.field, self.got, self.expected = str(file), field, str(got), str(expected)
        super().__init__(self.file, field, self.got, self.expected)

    def __str__(self) -> str:
        line = f"{self.file}: {self.field}: got {self.got}, expected {self.expected}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def check(field: str, got: object, ok: bool, expected: object, file: object = "arguments") -> None:
    """Raise LlamaError unless ok."""
    if not ok:
        raise LlamaError(file, field, got, expected)


def is_whole(n: object) -> bool:
    """Whether n is an integer, of Python or of numpy."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def is_number(x: object) -> bool:
    """Whether x is a number, of Python or of numpy, that float32 does not round to ±∞."""
    return (is_whole(x) or isinstance(x, float | np.floating)) and abs(np.asarray(x).item()) < 2**128 - 2**103


def check_config(config: Any, file: object = "config") -> None:
    """Refuse a `Config` that describes no Llama."""
    must = partial(check, file=file)
    for field in SIZES:
        size = getattr(config, field)
        must(field, repr(size), is_whole(size) and 1 <= size < 2**31, "a whole number from 1 to 2147483647")
    must("head_dim", config.head_dim, config.head_dim % 2 == 0, "an even number")
    must("tied", repr(config.tied), isinstance(config.tied, bool), "True or False")
    must("eps", config.eps, is_number(config.eps) and bool(np.float32(config.eps) > 0), "a finite number above 0")
    must("theta", config.theta, is_number(config.theta) and config.theta > 1, "a finite number above 1")
    scaling = RopeScaling("linear", 1) if config.rope_scaling is None else config.rope_scaling
    must("rope_scaling", repr(scaling), isinstance(scaling, RopeScaling), "a RopeScaling, or None")
    kind, factor, ctx, low, high, scale = scaling
    must("rope_scaling", kind, kind in ("linear", "llama3", "yarn"), "linear, llama3 or yarn")
    must("rope_scaling.factor", factor, is_number(factor) and factor >= 1, "a finite number of at least 1")
    if kind != "linear":
        must("rope_scaling.original_ctx", ctx, is_whole(ctx) and ctx > 0, "a whole number above 0")
        must("rope_scaling", (low, high), is_number(low) and is_number(high) and 0 < low < high, "0 < low < high")
        must("rope_scaling.attention_factor", scale, is_number(scale) and scale > 0, "a finite number above 0")


def check_tensors(expected: Mapping[str, Any], found: Mapping[str, Any], file: object) -> None:
    """Refuse shapes, by name, other than those expected: a missing one, an unexpected one, or a different one."""
    for kind, these, others in (("missing", expected, found), ("unexpected", found, expected)):
        names = [name for name in these if name not in others]
        check("tensors", f"{len(names)} {kind} ({', '.join(names[:3])})", not names, len(expected), file)
    for name, shape in expected.items():
        check(name, tuple(found[name]), tuple(found[name]) == tuple(shape), tuple(shape), file)


def check_params(params: Params, config: Config, file: object = "params") -> None:
    """Refuse parameters other than those of the config: one missing or unexpected, another shape, whole numbers."""
    stacked = isinstance(cast(Any, params.blocks), Block)
    check("blocks", "layers stacked in one Block", not stacked, "a tuple; lovely_llama_tools.fast takes both", file)
    wanted, found = (jax.tree.leaves_with_path(tree) for tree in (shapes(config), params))
    expected = {jax.tree_util.keystr(path): leaf.shape for path, leaf in wanted}
    check_tensors(expected, {jax.tree_util.keystr(path): leaf.shape for path, leaf in found}, file)
    for path, leaf in found:
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        check(jax.tree_util.keystr(path), leaf.dtype, real, "a floating-point dtype", file)


def check_tokens(tokens: Any, vocab: int, limit: int, file: object = "arguments") -> Int[np.ndarray, " seq"]:
    """Refuse token ids outside the vocabulary, an empty sequence, or more than `limit` ids; return them as int32.

    Inside `jit` all three would pass in silence: an index out of range is clamped."""
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


def checked_tokens(params: Params, tokens: Any, cache: Any, start: Any, config: Config, first: Any) -> Any:
    """The ids for `llama`, once all its arguments are found to fit; of what is traced, its shape."""
    check_params(params, config)
    begin = 0 if isinstance(start, core.Tracer) else np.asarray(start).tolist()
    check("start", begin, is_whole(begin) and 0 <= begin < config.ctx, f"a position from 0 to {config.ctx - 1}")
    limit = config.ctx - begin
    ids: Any = tokens if isinstance(tokens, core.Tracer) else jnp.asarray(check_tokens(tokens, config.vocab, limit))
    end = begin + len(ids)
    check("tokens", f"{len(ids)} tokens", 0 < len(ids) <= limit, f"1 to {limit}")
    layers = len(cache.keys if isinstance(cache, Cache) else cache)
    check("cache", f"{layers} layers", layers == config.layers, config.layers)
    held, own = jax.tree.leaves(cache)[0], jnp.result_type(params.embed)
    check("cache", f"{held.shape[-2]} positions", end <= held.shape[-2], f"at least {end}")
    check("cache", held.dtype, held.dtype == own, f"{own}, the dtype of the parameters")
    later = np.greater(0 if isinstance(start + first, core.Tracer) else first, range(begin, end))  # either is traced
    check("first", "a later token", not np.any(later), "no later one")
    return ids


def checked_batch(tokens: Any, targets: Any, config: Config, first: Any) -> tuple[Any, Any]:
    """The ids for `loss`, once its arguments are found to fit; of what is traced, its shape."""
    ids, answers = (cast(Any, x if isinstance(x, core.Tracer) else np.asarray(x)) for x in (tokens, targets))
    check("targets", answers.shape, answers.shape == ids.shape, f"{ids.shape}, as tokens")
    check("tokens", ids.shape, (0,) < ids.shape[-1:] <= (config.ctx,), f"rows of 1 to {config.ctx}")
    later = np.greater(0 if isinstance(first, core.Tracer) else first, range(ids.shape[-1]))
    check("first", "a later token", not np.any(later), "no later one")
    if not isinstance(ids, core.Tracer):
        check_tokens(ids.ravel(), config.vocab, ids.size)
    if not isinstance(answers, core.Tracer):
        check_tokens(np.maximum(answers, 0).ravel(), config.vocab, answers.size, "targets")
    return ids, answers


def check_sampling(sampling: Sampling, vocab: int, file: object = "arguments") -> None:
    """Refuse values for which a sampler is not defined."""
    for name, value in sampling._asdict().items():
        bound, lower, limit = LIMITS[name]
        kind, good = ("whole", is_whole) if limit is None else ("finite", is_number)
        upper = vocab if limit is None else limit
        x = float(np.float32(value)) if limit is not None and good(value) else value  # which it becomes
        ok = value is None or (good(value) and lower <= x <= upper and (bound == "from" or x > lower))
        check(name, repr(value), ok, f"a {kind} number {bound} {lower}, at most {upper}", file)


# ---- 8. Published models ---------------------------------------------------------------------------------------------
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

__all__ = [
    "CONFIGS", "GAINS", "SAMPLERS", "Adapter", "Attention", "Block", "Cache", "Config", "FeedForward", "LlamaError",
    "Moments", "Params", "Positions", "RopeScaling", "Sampling", "adamw", "adapt", "attend", "attention", "axes",
    "block", "categorical", "check_config", "check_params", "check_sampling", "check_tensors", "check_tokens",
    "choose", "clip", "count", "cross_entropy", "embed", "empty_cache", "greedy", "init", "learning_rate", "llama",
    "logits", "loss", "min_p", "moments", "positions", "readout", "repetition_penalty", "rms_norm", "rope",
    "rope_angles", "rope_frequencies", "shapes", "silu", "softmax", "swiglu", "temperature", "top_k", "top_p",
]  # fmt: skip
