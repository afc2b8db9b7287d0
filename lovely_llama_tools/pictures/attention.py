"""A picture of attention: the weight that each head gives each token, a grid of layers × heads."""

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import numpy as np
from jaxtyping import Float

from ..extras import extra
from .style import INK, legible, new_figure

LONGEST = 256  # tokens of a text whose maps can still be told apart
LABELLED = 24  # tokens that are named beside a map


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
