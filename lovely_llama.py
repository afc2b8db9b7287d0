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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt

__version__ = "0.1.0"
__all__ = [
    "CONFIGS", "KEEP", "RULES", "SAMPLERS", "Adapter", "Attention", "Block", "Cache", "Caches", "Config", "FeedForward",
    "LlamaError", "Moments", "Params", "RopeScaling", "Sampler", "Sampling", "accumulate", "adamw", "adapt", "attend",
    "attention", "block", "categorical", "check_cache", "check_causality", "check_config", "check_heads",
    "check_params", "check_rotation", "check_rows", "check_tensors", "check_tokens", "choose", "clip", "count",
    "embed_tokens", "empty_cache", "fold_layers", "greedy", "hidden_states", "init", "learning_rate", "llama", "logits",
    "loss", "min_p", "moments", "readout", "repetition_penalty", "rms_norm", "rope", "rope_angles", "rope_frequencies",
    "shapes", "silu", "softmax", "specs", "stack", "swiglu", "temperature", "top_k", "top_p",
]  # fmt: skip
SIZES = ("vocab", "dim", "layers", "kv_heads", "q_per_kv", "head_dim", "hidden_dim", "ctx")  # of a `Config`


# ---- 1. Errors and checks, and arrays on several devices -------------------------------------------------------------
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


# The axes of a device mesh over which each of our axes is split. "tensor" divides each product of a layer, Shoeybi et
# al. 2019, arXiv:1909.08053, §3; "fsdp" stores matrices in parts, Rajbhandari et al. 2019, arXiv:1910.02054, §5 (ZeRO).
RULES: dict[str, tuple[str, ...]] = dict.fromkeys(("vocab", "kv_heads", "hidden_dim"), ("tensor",))
RULES.update(batch=("data", "fsdp"), seq=("seq",), dim=("fsdp",))


def split(axes: Sequence[str], names: Sequence[str], rules: Any = RULES) -> PartitionSpec:
    """How an array with these axes is split over a mesh whose axes have these names."""
    return PartitionSpec(*(tuple(name for name in rules.get(axis, ()) if name in names) or None for axis in axes))


def held(x: Float[Array, "*shape"], *axes: str) -> Float[Array, "*shape"]:
    """x, on a mesh of devices (`jax.set_mesh`) split by its axes, but "" kept whole; elsewhere unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, split(axes, mesh.axis_names))


def is_whole(n: object) -> bool:
    """Whether n is an integer, of Python or of numpy."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def is_number(x: object) -> bool:
    """Whether x is a finite number, of Python or of numpy."""
    return is_whole(x) or (isinstance(x, float | np.floating) and bool(np.isfinite(cast(Any, x))))


def check_config(config: Any, file: object = "config") -> None:
    """Refuse a `Config` that describes no Llama."""
    must, scaling = partial(check, file=file), config.rope_scaling
    for field in SIZES:
        size = getattr(config, field)
        must(field, repr(size), is_whole(size) and 1 <= size < 2**31, "a whole number from 1 to 2147483647")
    must("head_dim", config.head_dim, config.head_dim % 2 == 0, "an even number")
    must("eps", config.eps, is_number(config.eps) and config.eps > 0, "a finite number above 0")
    must("theta", config.theta, is_number(config.theta) and config.theta > 1, "a finite number above 1")
    if scaling is not None:
        must("rope_scaling", scaling.kind, scaling.kind in ("linear", "llama3", "yarn"), "linear, llama3 or yarn")
        must("rope_scaling.factor", s := scaling.factor, is_number(s) and s >= 1, "a finite number of at least 1")
    if scaling is not None and scaling.kind != "linear":
        ctx, low, high, factor = scaling.original_ctx, scaling.low, scaling.high, scaling.attention_factor
        must("rope_scaling.original_ctx", ctx, is_whole(ctx) and ctx > 0, "a whole number above 0")
        must("rope_scaling", (low, high), is_number(low) and is_number(high) and 0 < low < high, "0 < low < high")
        must("rope_scaling.attention_factor", factor, is_number(factor) and factor > 0, "a finite number above 0")


def check_tensors(expected: Mapping[str, Any], found: Mapping[str, Any], file: object) -> None:
    """Refuse shapes, by name, other than those expected: a missing one, an unexpected one, or a different one."""
    missing, extra = [n for n in expected if n not in found], [n for n in found if n not in expected]
    check("tensors", f"{len(missing)} missing ({', '.join(missing[:3])})", not missing, len(expected), file)
    check("tensors", f"{len(extra)} unexpected ({', '.join(extra[:3])})", not extra, len(expected), file)
    for name, shape in expected.items():
        check(name, tuple(found[name]), tuple(found[name]) == tuple(shape), tuple(shape), file)


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
    """All hyperparameters, checked when it is made. Hashable, hence a valid static argument of `jit`; no defaults."""

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

    def __post_init__(self) -> None:
        check_config(self)
        for field in SIZES:  # which numpy's integers could overflow
            object.__setattr__(self, field, int(getattr(self, field)))


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
Firsts = Int[Array, " seq"] | int  # the first position that each token sees: in a packed row, its document's first
Number = float | int | Float[Array, ""] | Int[Array, ""]


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


def check_params(params: Params, config: Config, file: object = "params") -> None:
    """Refuse parameters other than those of the config: a missing one, an unexpected one, or another shape."""
    whole = shapes(config)
    whole = whole._replace(blocks=jax.eval_shape(stack, whole.blocks)) if isinstance(params.blocks, Block) else whole
    named = (dict(jax.tree.leaves_with_path(tree)) for tree in (whole, params))
    wanted, found = ({jax.tree_util.keystr(path): leaf.shape for path, leaf in tree.items()} for tree in named)
    check_tensors(wanted, found, file)


# ---- 3. Functions of one vector --------------------------------------------------------------------------------------
BLOCK = 256  # keys per iteration of `attend`; half that for a single token, which then reads fewer unused positions


def wide(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x in float32; float64 stays as it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def rms_norm(x: Float[Array, " dim"], gain: Float[Array, " dim"], eps: float) -> Float[Array, " dim"]:
    """Scale x to unit root-mean-square, then by a learned gain.

        yᵢ = gᵢ xᵢ / √(ε + ¹⁄ₙ Σⱼ xⱼ²)

    Zhang & Sennrich 2019, arXiv:1910.07467, eq. (4). ε is not in the paper."""
    return (wide(gain) * wide(x) * lax.rsqrt(eps + jnp.mean(wide(x) ** 2))).astype(x.dtype)


def rope_frequencies(config: Config) -> Float[Array, " pairs"]:
    """The angle in radians by which each pair turns from one position to the next.

        fᵢ = θ^(−2i/d);  with scaling  κᵢ fᵢ + (1 − κᵢ) fᵢ / s

    Su et al. 2021, arXiv:2104.09864, eq. (15). κ = 0 is linear interpolation, Chen et al. 2023, arXiv:2306.15595,
    eq. (4); llama3's κ is from Meta's code for Llama 3.1; yarn: Peng et al. 2023, arXiv:2309.00071, §3.2, with the ramp
    over i as in the authors' code, not over wavelengths as in the paper."""
    i, scaling = np.arange(config.head_dim // 2), config.rope_scaling or RopeScaling("linear", 1.0)
    f = 1 / config.theta ** (2 * i / config.head_dim)
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

    Su et al. 2021, arXiv:2104.09864, eq. (34)."""
    a, b = wide(x).reshape(-1, 2).T
    cos, sin = jnp.cos(angles).astype(a.dtype), jnp.sin(angles).astype(a.dtype)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape).astype(x.dtype)


def softmax(scores: Float[Array, " n"]) -> Float[Array, " n"]:
    """exp(xᵢ) / Σⱼ exp(xⱼ). Subtracting the maximum cancels in the ratio and keeps exp finite."""
    weights = jnp.exp(wide(scores) - wide(scores).max())
    return (weights / weights.sum()).astype(scores.dtype)


def attend(
    q: Float[Array, " head_dim"], keys: Float[Array, "ctx head_dim"], values: Float[Array, "ctx head_dim"],
    position: Position, first: Position = 0, filled: Position | None = None, size: int = BLOCK,
) -> Float[Array, " head_dim"]:  # fmt: skip
    """Average the values up to the query's position, weighted by how well their keys match the query.

        softmax(q Kᵀ / √d) V,  over the keys at positions first … position

    Vaswani et al. 2017, arXiv:1706.03762, eq. (1), as an online softmax over blocks of `size` keys: Milakov &
    Gimelshein 2018, arXiv:1805.02867, alg. 3; Rabe & Staats 2021, arXiv:2112.05682, §2. Blocks from position `filled`
    on, which hold no keys yet, are not read. The loop is differentiable unless `filled` is an array."""
    (ctx, head_dim), size = keys.shape, min(size, len(keys))

    def fold(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = state
        begin = jnp.minimum(i * size, ctx - size)  # the last block may overlap the one before
        at = begin + jnp.arange(size)
        k, v = (wide(lax.dynamic_slice_in_dim(rows, begin, size)) for rows in (keys, values))
        seen = (jnp.maximum(i * size, first) <= at) & (at <= position)
        scores = jnp.where(seen, wide(q) / math.sqrt(head_dim) @ k.T, -jnp.inf)
        # Any shift near the maximum cancels. `ceil` has zero derivative, so autodiff treats it as a constant.
        new_top = jnp.ceil(jnp.maximum(top, scores.max()))
        kept, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top)
        return new_top, kept * total + weights.sum(), kept * mixed + weights @ v

    zero, least = jnp.zeros_like(wide(q)), float(jnp.finfo(wide(q).dtype).min)  # not −∞: ∞ − ∞ is NaN
    blocks = ((ctx if filled is None else filled) + size - 1) // size
    _, total, mixed = lax.fori_loop(0, blocks, jax.checkpoint(fold), (zero[0] + least, zero[0], zero))
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
    config: Config, first: Firsts = 0,
) -> tuple[Float[Array, "seq dim"], Cache]:  # fmt: skip
    """Each token attends to those from `first` up to itself, with every query head; W_O mixes the results.

        headₕ = attend(R W_Qʰ x, R W_K x, W_V x),  y = W_O [head₁; …; headₙ]

    Vaswani et al. 2017, §3.2.2; query heads share keys and values as in Ainslie et al. 2023, arXiv:2305.13245, §2.2.
    YaRN's temperature, arXiv:2309.00071, §3.4, is applied to the query alone, squared."""
    positions, size = start + jnp.arange(len(x)), BLOCK if len(x) > 1 else BLOCK // 2
    sharpness = config.rope_scaling.attention_factor**2 if config.rope_scaling else 1.0

    def remember(w_k: Float[Array, "head_dim dim"], w_v: Float[Array, "head_dim dim"]) -> Cache:
        return vmap(lambda x, angles: Cache(rope(w_k @ x, angles), w_v @ x))(x, angles)

    def group(w_q: Float[Array, "q_per_kv head_dim dim"], keys: Array, values: Array) -> Array:
        def head(w_q: Float[Array, "head_dim dim"]) -> Float[Array, "seq head_dim"]:
            def token(x: Float[Array, " dim"], angles: Float[Array, " pairs"], at: Position, first: Position) -> Array:
                return attend(sharpness * rope(w_q @ x, angles), keys, values, at, first, start + len(positions), size)

            return vmap(token)(x, angles, positions, jnp.broadcast_to(first, len(positions)))

        return vmap(head)(w_q)

    write = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    cache = jax.tree.map(write, cache, vmap(remember)(w.k, w.v))
    heads = vmap(group)(w.q, *cache)
    return vmap(lambda heads: jnp.tensordot(w.o, heads, 3))(jnp.moveaxis(heads, 2, 0)), cache


def block(
    w: Block, x: Float[Array, "seq dim"], angles: Float[Array, "seq pairs"], cache: Cache, start: Position,
    config: Config, first: Firsts = 0,
) -> tuple[Float[Array, "seq dim"], Cache]:  # fmt: skip
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x)).

    Touvron et al. 2023, arXiv:2302.13971, §2.2; norms first, as in Xiong et al. 2020, arXiv:2002.04745, fig. 1(b)."""
    normed = vmap(lambda x: rms_norm(x, w.attn_norm, config.eps))(x)
    answer, cache = attention(w.attn, normed, angles, cache, start, config, first)
    x = held(x + answer, "seq", "")
    return held(x + vmap(lambda x: swiglu(rms_norm(x, w.ffn_norm, config.eps), *w.ffn))(x), "seq", ""), cache


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
    x = held(held(params.embed, "vocab", "")[tokens], "seq", "")
    return x, vmap(lambda i: rope_angles(start + i, config))(jnp.arange(len(tokens)))


# What a layer stores for its derivative: its products with weights, of size seq, or its input alone. The rest is
# recomputed; attention's scores, of size seq², are never all in memory. A checkpointed layer is also traced only once.
KEEP = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "nothing": None}


def hidden_states(
    params: Params, tokens: Int[Array, " seq"], cache: Caches, start: Position, config: Config, keep: str = "dots",
    first: Firsts = 0,
) -> tuple[Float[Array, "seq dim"], Caches]:  # fmt: skip
    """The output of the last layer for tokens at positions start, start + 1, …: `llama` without its `readout`."""
    x, angles = embed_tokens(params, tokens, start, config)
    layer = jax.checkpoint(lambda x, w, cache: block(w, x, angles, cache, start, config, first), policy=KEEP[keep])
    return fold_layers(layer, x, params.blocks, cache)


def readout(params: Params, x: Float[Array, " dim"], config: Config) -> Float[Array, " vocab"]:
    """The next token's logits: ⟨norm(x), Uₜ⟩ for each token t. A tied model has U = E, arXiv:1608.05859."""
    unembed = params.embed if params.unembed is None else params.unembed
    return jnp.inner(rms_norm(x, params.norm, config.eps), unembed)  # under vmap a row per token, as `loss` reads them


def llama(
    params: Params, tokens: Int[Array, " seq"], cache: Caches, start: Position, config: Config, keep: str = "dots",
    first: Firsts = 0,
) -> tuple[Float[Array, "seq vocab"], Caches]:  # fmt: skip
    """The model: the logits after each of the tokens at positions start, start + 1, …, and the cache with them added.

    With a static `start` the result is differentiable; with an array, such as `jit` makes of an argument, it is not,
    and reads only what is filled. Under `jit`, where nothing can raise, ids must be valid and the cache have room."""
    if not isinstance(tokens, jax.core.Tracer) and not isinstance(start, jax.core.Tracer):
        check_params(params, config)
        tokens = jnp.asarray(check_tokens(tokens, config.vocab, config.ctx - int(start)))
        room, end = jax.tree.leaves(cache)[0].shape[-2], len(tokens) + int(start)
        check("cache", f"{room} positions", end <= room, f"at least {end}")
    x, cache = hidden_states(params, tokens, cache, start, config, keep, first)
    return held(vmap(lambda x: readout(params, x, config))(x), "seq", "vocab"), cache


def logits(
    params: Params, tokens: Int[Array, " seq"], config: Config, keep: str = "dots", first: Firsts = 0
) -> Float[Array, "seq vocab"]:
    """`llama` from position 0, without the cache."""
    caches = empty_cache(config, np.size(tokens), params.embed.dtype)
    cache = vmap(lambda _: caches[0])(params.blocks.attn_norm) if isinstance(params.blocks, Block) else caches
    return llama(params, tokens, cache, 0, config, keep, first)[0]


# ---- 5. Initialisation -----------------------------------------------------------------------------------------------
def init(rng: Key[Array, ""], config: Config) -> Params:
    """Parameters to train from: gains 1, matrices normal with σ = 0.02, but o and down with σ = 0.02 / √(2 layers).

    Those two add to the residual stream, whose variance then does not grow with depth: Radford et al. 2019, §2.3.
    llama2.c scales up in place of down."""

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, rng: Key[Array, ""]) -> Array:
        if "norm" in path[-1].name:
            return jnp.ones(leaf.shape, leaf.dtype)
        σ = 0.02 / math.sqrt(2 * config.layers) if path[-1].name in ("o", "down") else 0.02
        return σ * jax.random.normal(rng, leaf.shape, leaf.dtype)

    tree = jax.tree.structure(wanted := shapes(config))
    return jax.tree.map_with_path(draw, wanted, tree.unflatten(jax.random.split(rng, tree.num_leaves)))


# ---- 6. Learning -----------------------------------------------------------------------------------------------------
def loss(
    params: Params, tokens: Int[Array, "*batch seq"], targets: Int[Array, "*batch seq"], config: Config,
    keep: str = "dots", dtype: Any = None, first: Int[Array, "*batch seq"] | int = 0,
) -> Float[Array, ""]:  # fmt: skip
    """Mean cross-entropy in nats: −¹⁄ₙ Σ log softmax(logits)ₜ over the n targets t that are not negative.

    Negative targets (−1 by convention) are ignored; where all are, the loss is 0. Shannon 1948, §6, with the model's
    probabilities inside the logarithm. `keep` is a name in `KEEP`; `dtype` is that of the arithmetic, to which these
    master weights are cast. Documents packed into a row do not see each other: each token's begins at `first`."""
    if not isinstance(tokens, jax.core.Tracer) and not isinstance(targets, jax.core.Tracer):
        tokens, targets = cast(Any, np.asarray(tokens)), cast(Any, np.asarray(targets))
        check("targets", targets.shape, targets.shape == tokens.shape, f"{tokens.shape}, as tokens")
        check("tokens", tokens.shape, (0,) < tokens.shape[-1:] <= (config.ctx,), f"rows of 1 to {config.ctx}")
        check("first", "a later token", not np.any(np.asarray(first) > np.arange(tokens.shape[-1])), "no later one")
        for ids, what in ((tokens, "arguments"), (np.maximum(targets, 0), "targets")):
            check_tokens(ids.ravel(), config.vocab, ids.size, what)
    if (mesh := jax.sharding.get_abstract_mesh()).explicit_axes:  # XLA decides inside, as on automatic axes
        automatic = jax.sharding.auto_axes(out_sharding=PartitionSpec())
        return automatic(lambda p, x, y, z: loss(p, x, y, config, keep, dtype, z))(params, tokens, targets, first)
    params = jax.tree.map(lambda w: w.astype(dtype or w.dtype), params)
    rows = [ids.reshape(-1, tokens.shape[-1]) for ids in (tokens, jnp.broadcast_to(first, tokens.shape))]
    (over,) = split(["batch"], mesh.axis_names)
    rows = vmap(lambda tokens, first: logits(params, tokens, config, keep, first), spmd_axis_name=over)(*rows)
    scores = wide(rows).reshape(-1, config.vocab)
    target, counts = targets.reshape(-1, 1), targets.reshape(-1) >= 0
    chosen = jnp.take_along_axis(scores, jnp.maximum(target, 0), axis=-1)[:, 0]
    surprise = jnp.where(counts, jax.nn.logsumexp(scores, axis=-1) - chosen, 0).sum()
    return surprise / jnp.maximum(counts.sum(), 1).astype(surprise.dtype)


def accumulate(
    objective: Callable[..., Array], params: Any, tokens: Int[Array, "micro batch seq"],
    targets: Int[Array, "micro batch seq"], *more: Int[Array, "micro batch seq"],
) -> tuple[Float[Array, ""], Any]:  # fmt: skip
    """The loss of all micro-batches and its gradient, Σ nᵢ/n ∇lossᵢ, where batch i has nᵢ of the n targets.

    `objective(params, tokens, targets, *more)` is the loss of one, such as `partial(loss, config=config)`. A mean of
    means would weight the targets of sparse batches more. One micro-batch is in memory at a time."""
    counts, value_and_grad, rows = (targets >= 0).sum((1, 2)), jax.value_and_grad(objective), (tokens, targets, *more)

    def add(sums: Any, micro: tuple[Array, ...]) -> tuple[Any, None]:
        share, parts = micro[0], value_and_grad(params, *micro[1:])
        return jax.tree.map(lambda sum, part: sum + share.astype(part.dtype) * part, sums, parts), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, params, *(ids[0] for ids in rows)))
    return lax.scan(add, zeros, (counts / jnp.maximum(counts.sum(), 1), *rows))[0]


def clip(gradients: Any, limit: float) -> tuple[Any, Float[Array, ""]]:
    """g · min(1, limit / ‖g‖), and ‖g‖, the norm over all leaves. Pascanu et al. 2013, arXiv:1211.5063, algorithm 1."""
    norm = jnp.sqrt(sum((wide(g) ** 2).sum() for g in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda g: (limit / jnp.maximum(norm, limit)).astype(g.dtype) * g, gradients), norm


class Moments(NamedTuple):
    """What AdamW remembers: steps taken, and running means of gradients and of their squares."""

    step: Int[Array, ""]
    first: Any
    second: Any


def moments(params: Any) -> Moments:
    """The moments before the first step: zeros."""
    return Moments(jnp.array(0), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))


def adamw(
    params: Any, gradients: Any, moments: Moments, rate: Number, decay: float,
    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
) -> tuple[Any, Moments]:  # fmt: skip
    """One step of Adam with decoupled weight decay, which spares the gains of norms.

        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  θ ← θ − η (m̂/(√v̂ + ε) + λθ),  m̂ = m/(1 − β₁ᵗ),  v̂ = v/(1 − β₂ᵗ)

    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, but with λ multiplied by η, as in torch."""
    step, (β1, β2) = moments.step + 1, betas
    first = jax.tree.map(lambda m, g: β1 * m + (1 - β1) * g, moments.first, gradients)
    second = jax.tree.map(lambda v, g: β2 * v + (1 - β2) * g**2, moments.second, gradients)
    known1, known2 = (1 - jnp.asarray(β) ** step for β in betas)

    def update(path: tuple[Any, ...], θ: Array, m: Array, v: Array) -> Array:
        η, m, v = jnp.asarray(rate, θ.dtype), m / known1.astype(m.dtype), v / known2.astype(v.dtype)
        return θ - η * (m / (jnp.sqrt(v) + eps) + (0 if "norm" in path[-1].name else decay) * θ)

    return jax.tree.map_with_path(update, params, first, second), Moments(step, first, second)


def learning_rate(step: int, peak: float, warmup: int, steps: int, final: float) -> float:
    """The rate of a step, counted from 0: linear up to peak at `warmup`, then half a cosine down to final at `steps`.

    Loshchilov & Hutter 2017, arXiv:1608.03983, eq. (5), without restarts. As in llama2.c, step 0 changes nothing."""
    if step < warmup:
        return peak * step / warmup
    turn = min(step - warmup, steps - warmup) / max(steps - warmup, 1)
    return final + 0.5 * (1 + math.cos(math.pi * turn)) * (peak - final)


class Adapter(NamedTuple):
    """A change BA of low rank to a matrix, with the axes of the matrix: those of its input in a, of its output in b."""

    a: Float[Array, "rank *inputs"]
    b: Float[Array, "*outputs rank"]


def adapt(params: Any, adapters: Any, scale: float) -> Any:
    """Parameters with W + s BA for each W that has an `Adapter` in the tree `adapters`, which has None elsewhere.

    Hu et al. 2021, arXiv:2106.09685, eq. (3), s = α/r. Trained are the adapters alone, by their own gradient."""

    def changed(adapter: Adapter | None, w: Any) -> Any:
        return w if adapter is None else w + scale * jnp.tensordot(adapter.b, adapter.a, 1).astype(w.dtype)

    return jax.tree.map(changed, adapters, params, is_leaf=lambda node: node is None or isinstance(node, Adapter))


# ---- 7. Choosing -----------------------------------------------------------------------------------------------------
# A sampler maps logits to logits. It excludes a token by −∞, so samplers compose, and `softmax` ends any chain of them.


def repetition_penalty(
    logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"], penalty: Number
) -> Float[Array, " vocab"]:
    """Divide the logits of tokens seen before by the penalty, or multiply them by it where they are negative.

    Keskar et al. 2019, arXiv:1909.05858, §4.1. The paper divides negative logits too, which rewards repetition."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def temperature(logits: Float[Array, " vocab"], t: Number) -> Float[Array, " vocab"]:
    """(xᵢ − maxⱼ xⱼ) / t; at t = 0 only the largest remain. Ackley et al. 1985, Cognitive Science 9, eq. (5)."""
    return jnp.where((below := logits - logits.max()) == 0, below, below / t)


def greedy(logits: Float[Array, " vocab"]) -> Float[Array, " vocab"]:
    """Keep the likeliest token alone; between equals the lowest id."""
    return jnp.where(jnp.arange(len(logits)) == jnp.argmax(logits), logits, -jnp.inf)


def bisect(holds: Callable[[Array], Array], width: int, dtype: Any) -> Int[Array, ""] | UInt[Array, ""]:
    """The largest n of so many bits for which `holds(n)`, true up to some n and false beyond, is true; or 0."""

    def bit(i: Array, n: Array) -> Array:
        higher = n | (jnp.asarray(1 << (width - 1), dtype) >> i.astype(dtype))
        return jnp.where(holds(higher), higher, n)

    return lax.fori_loop(0, width, bit, jnp.asarray(0, dtype))


def largest(x: Float[Array, " vocab"], measure: Num[Array, " vocab"], target: Number) -> Bool[Array, " vocab"]:
    """The smallest set of largest x whose measures sum to at least the target; between equals the lower ids.

    It holds every xᵢ above the cut-off  max {τ : Σᵢ mᵢ [xᵢ ≥ τ] ≥ target}  and as many equal to it as are needed.
    Floats are compared as unsigned integers in the same order, so that bisection is exact, and takes no sort."""
    ids, (unsigned, width) = jnp.arange(len(x)), (jnp.uint64, 64) if x.dtype == jnp.float64 else (jnp.uint32, 32)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), unsigned)  # −0 equals 0
    sign = jnp.asarray(1 << (width - 1), unsigned)
    order = jnp.where(bits < sign, bits | sign, ~bits)
    cut = bisect(lambda n: measure.sum(where=order >= n) >= target, width, unsigned)
    above, equal = order > cut, order == cut
    last = bisect(lambda n: measure.sum(where=above | (equal & (ids < n))) < target, len(x).bit_length(), ids.dtype)
    return above | (equal & (ids <= last))


def top_k(logits: Float[Array, " vocab"], k: Number) -> Float[Array, " vocab"]:
    """Keep exactly k likeliest tokens; between equals the lower ids. Fan et al. 2018, arXiv:1805.04833, §5.4."""
    return jnp.where(largest(logits, jnp.ones(len(logits), int), k), logits, -jnp.inf)


def top_p(logits: Float[Array, " vocab"], p: Number) -> Float[Array, " vocab"]:
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least p.

    Holtzman et al. 2019, arXiv:1904.09751, eq. (2). The likeliest always remains, and p = 1 keeps all."""
    return jnp.where(largest(logits, softmax(logits), p) | (p >= 1), logits, -jnp.inf)


def min_p(logits: Float[Array, " vocab"], p: Number) -> Float[Array, " vocab"]:
    """Keep tokens at least p times as likely as the likeliest. Nguyen et al. 2024, arXiv:2407.01082, §3.1."""
    return jnp.where(softmax(logits) >= p * softmax(logits).max(), logits, -jnp.inf)


def categorical(rng: Key[Array, ""], logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """A token with the probabilities softmax(logits): the first whose cumulative probability exceeds a uniform number.

    Inverse transform sampling, Devroye 1986, Non-Uniform Random Variate Generation, §III.2."""
    p, ids = softmax(logits), jnp.arange(len(logits))
    u = jax.random.uniform(rng, dtype=p.dtype) * p.sum()
    return bisect(lambda n: jnp.where(ids < n, p, 0).sum() <= u, len(p).bit_length(), ids.dtype)


@dataclass(frozen=True)
class Sampler:
    """A row of the table below: a sampler, what it does for a user, and the numbers it is defined for."""

    apply: Callable[[Array, Array, Any], Array]  # to logits, the tokens seen before, and its number
    says: str
    least: int
    most: int | float | None  # None: a whole number, at most vocab
    strict: bool = False  # above the least


SAMPLERS: dict[str, Sampler] = {
    "repetition_penalty": Sampler(repetition_penalty, "divide logits of tokens seen before by it", 0, math.inf, True),
    "temperature": Sampler(lambda x, _, t: jnp.where(t == 0, greedy(x), temperature(x, t)),
        "divide the logits by it; 0 always takes the likeliest token", 0, math.inf),
    "top_k": Sampler(lambda x, _, k: top_k(x, k), "take from so many likeliest tokens", 1, None),
    "top_p": Sampler(lambda x, _, p: top_p(x, p), "take from the likeliest that sum to this probability", 0, 1, True),
    "min_p": Sampler(lambda x, _, p: min_p(x, p), "take from those so many times as likely as the likeliest", 0, 1),
}  # fmt: skip


class Sampling(NamedTuple):
    """How a token is chosen: by the samplers of the table above, in its order. None leaves one out.

    The defaults are those of Meta's generation.py. As a tree of numbers and Nones it goes through `jit`, which compiles
    anew for another set of samplers, not for other numbers."""

    repetition_penalty: float | None = None
    temperature: float | None = 0.6
    top_k: int | None = None
    top_p: float | None = 0.9
    min_p: float | None = None

    def __call__(self, logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"]) -> Float[Array, " vocab"]:
        logits = wide(logits)
        for sampler, value in zip(SAMPLERS.values(), self, strict=True):
            logits = logits if value is None else sampler.apply(logits, seen, value)
        return logits

    def check(self, vocab: int) -> None:
        """Refuse values for which a sampler is not defined."""
        for (name, s), value in zip(SAMPLERS.items(), self, strict=True):
            top, kind, valid = (vocab, "whole", is_whole) if s.most is None else (s.most, "finite", is_number)
            ok = value is None or (valid(value) and s.least <= value <= top and not (s.strict and value == s.least))
            check(name, repr(value), ok, f"a {kind} number {'above' if s.strict else 'from'} {s.least}, at most {top}")


@jax.jit
def choose(
    rng: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"],
    sampling: Sampling,
) -> tuple[Int[Array, ""], Bool[Array, " vocab"]]:  # fmt: skip
    """Draw the token for a position and mark it as seen; −1 where a logit, or its penalised value, is not finite."""
    penalised = Sampling(sampling.repetition_penalty, None, None, None, None)(logits, seen)
    drawn = categorical(jax.random.fold_in(rng, position), sampling(logits, seen))
    token = jnp.where(jnp.isfinite(penalised).all(), drawn, -1)
    return token, seen.at[token].set(True, mode="drop")


# ---- 8. Devices ------------------------------------------------------------------------------------------------------
def specs(config: Config, mesh: Mapping[str, int] | None = None) -> Params:
    """Every parameter's partition over a mesh with axes of these sizes, read off its annotation by `RULES`.

    With parameters placed so, XLA's partitioner derives all communication: Xu et al. 2021, arXiv:2105.04663. Where
    key/value heads are too few to be split, the query heads of each are. Without a mesh, nothing is checked."""
    sizes, few = mesh or dict.fromkeys(("data", "fsdp", "tensor", "seq"), 1), {"kv_heads": (), "q_per_kv": ("tensor",)}
    rules = RULES | (few if config.kv_heads % sizes.get("tensor", 1) else {})

    def leaf(axes: list[str]) -> PartitionSpec:
        for axis in axes:
            size, parts = getattr(config, axis), math.prod(sizes.get(name, 1) for name in rules.get(axis, ()))
            check(axis, size, size % parts == 0, f"a multiple of {parts}, the devices that split it", "mesh")
        return split(axes, [*sizes], rules)

    return by_axes(config, leaf)


# ---- 9. Properties ---------------------------------------------------------------------------------------------------
# What holds for any Llama, to call on your own. A model is a function from token ids to logits, (seq) to (seq, vocab),
# in arrays that numpy can read. A check returns None, or raises AssertionError saying where the property fails.


def plain(array: Any) -> Float[np.ndarray, "..."]:
    """An array in float64, torch's bfloat16 too, which numpy cannot read."""
    return np.asarray(array.detach().cpu().double() if hasattr(array, "detach") else array, np.float64)


def require(holds: bool, says: str) -> None:
    """Raise AssertionError unless it holds, under `python -O` too."""
    if not holds:
        raise AssertionError(says)


def same(got: Any, want: Any, bound: float, what: str) -> None:
    """Fail unless ‖got − want‖ ≤ bound ‖want‖; with a bound of 0, unless all values are equal."""
    a, b = plain(got), plain(want)
    require(a.shape == b.shape, f"{what}: got shape {a.shape}, expected {b.shape}")
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    require(error <= bound, f"{what}: got a relative error of {error:.1e}, expected at most {bound:.0e}")


def logits_of(model: Callable[[Any], Any], tokens: Any) -> Float[np.ndarray, "seq vocab"]:
    """A model's logits, one row for each token."""
    scores = plain(model(tokens))
    fits = scores.ndim == 2 and len(scores) == len(tokens)
    require(fits, f"logits: got shape {scores.shape}, expected ({len(tokens)}, vocab)")
    return scores


def check_causality(model: Callable[[Any], Any], tokens: Any, vocab: int) -> None:
    """Another token at t leaves all logits before t bit for bit the same, and changes those at t."""
    want = logits_of(model, tokens := np.array(tokens))
    for t in range(len(tokens)):
        other = tokens.copy()
        other[t] = (tokens[t] + 1) % vocab
        got = logits_of(model, other)
        same(got[:t], want[:t], 0.0, f"logits before a change at {t}")
        require(bool((got[t] != want[t]).any()), f"logits at a change at {t}: got the same, expected a change")


def check_cache(step: Callable[..., Any], model: Callable[[Any], Any], tokens: Any, bound: float) -> None:
    """A prefill followed by decoding token by token gives the logits of the whole, for every length of the prefill.

    `step(tokens, cache)` returns logits and a cache, and takes None for an empty cache."""
    want = logits_of(model, tokens := np.asarray(tokens))
    for cut in range(1, len(tokens)):
        logits, cache = step(tokens[:cut], None)
        same(logits, want[:cut], bound, f"logits of a prefill of {cut}")
        for t in range(cut, len(tokens)):
            logits, cache = step(tokens[t : t + 1], cache)
            same(plain(logits)[-1], want[t], bound, f"logits at {t} after a prefill of {cut}")


def check_rows(rows: Callable[..., Any], model: Callable[[Any], Any], tokens: Sequence[Any], bound: float) -> None:
    """Rows of unequal lengths run as one batch, in either order, have the logits they have alone."""
    want = [logits_of(model, np.asarray(row)) for row in tokens]
    for order in (slice(None), slice(None, None, -1)):
        for got, alone, row in zip(rows(tokens[order]), want[order], tokens[order], strict=True):
            same(got, alone, bound, f"logits of the row of {len(row)}")


def check_rotation(rotate: Callable[[Any, int], Any], head_dim: int, bound: float) -> None:
    """`rotate(x, position)` keeps norms, is the identity at 0, and gives products that depend on distance alone."""
    q, k = np.random.default_rng(0).normal(size=(2, head_dim)).astype(np.float32)
    scale = float(np.linalg.norm(q) * np.linalg.norm(k))

    def product(m: int, n: int) -> float:
        return float(plain(rotate(q, m)) @ plain(rotate(k, n)))

    same(rotate(q, 0), q, bound, "a vector rotated at 0")
    same(np.linalg.norm(plain(rotate(q, 77))), np.linalg.norm(q), bound, "a norm at 77")
    for distance in (0, 1, 63, 300):
        want = product(distance, 0)
        for position in (1, 64, 500):
            got = product(position + distance, position)
            same(got + scale, want + scale, bound, f"a product over distance {distance} at {position}")
    require(abs(product(1, 0) - product(0, 0)) > bound, "a product over distance 1: got that over 0")


def check_heads(model: Callable[..., Any], params: Params, config: Config, tokens: Any, bound: float) -> None:
    """`model(params, config, tokens)` gives the same with other orders of heads, and keys and values for each of them.

    Your own model takes the parameters through lovely_llama_tools' `to_hf` or `to_llama2c`."""
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
