"""Attention maps: the weight that each head gives each token, and their picture, a grid of layers × heads."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from textwrap import shorten
from typing import Any

import numpy as np
from jax import numpy as jnp
from jax import vmap
from jaxtyping import Array, Float, Int

from lovely_llama import (
    Attention,
    Block,
    Cache,
    Config,
    Params,
    Positions,
    attention,
    block,
    check_tokens,
    embed,
    empty_cache,
    positions,
    rms_norm,
)

from ..devices.programs import Program
from ..extras import extra
from ..fast.layers import in_tuple
from .style import INK, legible, new_figure

LONGEST = 256  # tokens of a text whose maps can still be told apart
LABELLED = 24  # tokens that are named beside a map


def attention_weights(
    params: Params, tokens: Int[Array | np.ndarray, " seq"] | Sequence[int], config: Config
) -> list[Float[np.ndarray, "kv_heads q_per_kv seq seq"]]:
    """The weights with which each token, in the row, attends to each, in the column: of every head, layer by layer."""
    ids = check_tokens(tokens, config.vocab, config.ctx)
    x = embed(params, ids)
    where = positions(0, len(ids), config)
    (cache,) = empty_cache(replace(config, layers=1), len(ids), params.embed.dtype)
    found = list[Float[np.ndarray, "kv_heads q_per_kv seq seq"]]()
    for w in in_tuple(params).blocks:
        weights, x = observe(w, x, cache, where, config)
        found.append(np.asarray(weights, np.float32))
    return found


@partial(Program, static_argnames="config")
def observe(
    w: Block, x: Float[Array, "seq dim"], cache: Cache, where: Positions, config: Config
) -> tuple[Float[Array, "kv_heads q_per_kv seq seq"], Float[Array, "seq dim"]]:
    """A layer's attention weights, and its output."""
    normed = vmap(lambda x: rms_norm(x, w.attn_norm, config.eps))(x)
    seq, width = len(x), config.head_dim
    parts = [probe(w.attn, normed, cache, where, begin, config) for begin in range(0, seq, width)]
    return jnp.concatenate(parts, axis=-1)[..., :seq], block(w, x, cache, where, config.eps)[0]


def probe(
    w: Attention, x: Float[Array, "seq dim"], cache: Cache, where: Positions, begin: int, config: Config
) -> Float[Array, "kv_heads q_per_kv seq head_dim"]:
    """The weights on head_dim tokens from `begin` on, by `attention` itself.

        softmax(q Kᵀ / √d) V  with  V = I

    Each token's input is widened by its own unit vector, out of which W_V makes its value, while W_Q and W_K do not see
    it; W_O leaves the heads' results side by side."""
    (seq, dim), heads = x.shape, config.kv_heads * config.q_per_kv
    width = max(dim + config.head_dim, heads * config.head_dim)  # the output is as wide as the input

    def widened(matrix: Float[Array, "*rows dim"]) -> Float[Array, "*rows width"]:
        return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, width - dim)])

    unit = jnp.eye(seq, config.head_dim, -begin, dtype=x.dtype)
    value = jnp.eye(config.head_dim, width, dim, dtype=x.dtype)
    out = jnp.eye(width, heads * config.head_dim, dtype=x.dtype)
    values = jnp.broadcast_to(value, (config.kv_heads, *value.shape))
    unmixed = out.reshape(width, config.kv_heads, config.q_per_kv, config.head_dim)
    own = Attention(widened(w.q), widened(w.k), values, unmixed)
    y, _ = attention(own, widened(x).at[:, dim : dim + config.head_dim].set(unit), cache, where)
    weights = y[:, : heads * config.head_dim].reshape(seq, config.kv_heads, config.q_per_kv, config.head_dim)
    return jnp.moveaxis(weights, 0, 2)


# ---- The picture -----------------------------------------------------------------------------------------------------


def draw_attention(
    maps: dict[int, Float[np.ndarray, "kv_heads q_per_kv seq seq"]], labels: Sequence[str], title: str
) -> Any:
    """A figure of the maps of some layers: a row for each layer, a column for each head, as one image."""
    kv_heads, q_per_kv, seq, _ = next(iter(maps.values())).shape
    gap = max(1, round(seq / 12))
    lefts = [h * (seq + gap) + (h // q_per_kv) * gap for h in range(kv_heads * q_per_kv)]  # groups stand further apart
    tops = [i * (seq + gap) for i in range(len(maps))]
    canvas = np.full((tops[-1] + seq, lefts[-1] + seq), np.nan, np.float32)
    causal = np.tril(np.ones((seq, seq), bool))
    for top, weights in zip(tops, maps.values(), strict=True):
        for left, weight in zip(lefts, weights.reshape(-1, seq, seq), strict=True):
            canvas[top : top + seq, left : left + seq] = np.where(causal, weight, np.nan)
    named = seq <= LABELLED
    cell = min(max(8.5 / canvas.shape[1], 0.08 if named else 0.3 / seq), 0.3)  # inches
    height, width = (n * cell for n in canvas.shape)
    figure = new_figure(width + 2.4, height + (1.6 if named else 1.2))
    axes = figure.add_subplot()
    colors, blues = extra("matplotlib.colors", "plot"), extra("matplotlib", "plot").colormaps["Blues"]
    shades = colors.ListedColormap(blues(np.linspace(0.06, 1, 256)))  # no weight at all is not white
    norm = colors.PowerNorm(0.5, 0, 1)  # a root: most weights are small
    image = axes.imshow(canvas, cmap=shades, norm=norm)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.yaxis.tick_right()
    middle, layers = (seq - 1) / 2, [f"layer {layer}" for layer in maps]
    axes.set_xticks([left + middle for left in lefts], [f"head {h}" for h in range(len(lefts))])
    axes.set_yticks([top + middle for top in tops], layers)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    about = "Each row is a token; shades are the weights it gives to itself and to those before it"
    axes.set_title(f"{legible(shorten(title, int(12 * width)))}\n{about}", loc="left", color=INK, fontsize=10.5, pad=12)
    if named:
        name_tokens(axes, [legible(label) for label in labels], lefts, tops, min(8.5, 0.85 * 72 * cell))
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / height), pad=0.02, aspect=25)
    bar.set_label("attention weight", color=INK)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0", "0.05", "0.2", "0.5", "1"])
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    return figure


def name_tokens(axes: Any, labels: Sequence[str], lefts: Sequence[int], tops: Sequence[int], size: float) -> None:
    """Write the attending tokens beside the first map of each row, and those attended to under the last row."""
    for i, label in enumerate(labels):
        for top in tops:
            axes.text(-1, top + i, label, ha="right", va="center", fontsize=size, color=INK)
        for left in lefts:
            below = tops[-1] + len(labels)
            axes.text(left + i, below, label, ha="center", va="top", rotation=90, fontsize=size, color=INK)
