"""The picture of weights: the singular values of each kind of matrix, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, Params

from ..extras import extra, progress
from .style import INK, legible, new_figure, style

ROWS = 8192  # of a matrix that are widened to float64 at once

Spectrum = Float[np.ndarray, " n"]


def matrices(params: Params, layer: int) -> dict[str, Float[np.ndarray, "rows columns"]]:
    """The matrices of a layer by their names, [out, in], the axes of heads in one."""
    blocks: Any = params.blocks
    w = blocks[layer]
    found = {name: getattr(w.attn, name) for name in ("q", "k", "v", "o")}
    found |= {name: getattr(w.ffn, name) for name in ("gate", "up", "down")}
    dim = len(w.attn_norm)
    flat = {name: np.asarray(matrix, np.float32) for name, matrix in found.items()}
    return {name: m.reshape((dim, -1) if name in ("o", "down") else (-1, dim)) for name, m in flat.items()}


def singular_values(matrix: Float[np.ndarray, "rows columns"]) -> Spectrum:
    """The singular values of a float32 matrix, largest first: square roots of the eigenvalues of WᵀW, or of WWᵀ.

    In float64 they are as exact as a decomposition of W in float32 would give them, in a tenth of the time."""
    matrix = matrix if len(matrix) >= matrix.shape[1] else matrix.T
    gram = np.zeros((matrix.shape[1],) * 2)
    for first in range(0, len(matrix), ROWS):
        rows = matrix[first : first + ROWS].astype(np.float64)
        gram += rows.T @ rows
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0))


def spectra(params: Params, layers: Sequence[int]) -> tuple[dict[str, Spectrum], dict[str, dict[int, Spectrum]]]:
    """The singular values of the embeddings, and of each kind of matrix in each of some layers."""
    ends = {"embed": params.embed} | ({} if params.unembed is None else {"unembed": params.unembed})
    outer, kinds = dict[str, Spectrum](), dict[str, dict[int, Spectrum]]()
    with progress("singular values", len(ends) + len(layers)) as advance:
        for name, matrix in ends.items():
            outer[name] = singular_values(np.asarray(matrix, np.float32))
            advance(1)
        for layer in layers:
            for name, matrix in matrices(params, layer).items():
                kinds.setdefault(name, {})[layer] = singular_values(matrix)
            advance(1)
    return outer, kinds


def draw_spectra(
    outer: Mapping[str, Spectrum], kinds: Mapping[str, Mapping[int, Spectrum]], config: Config, title: str
) -> Any:
    """A figure with a panel for each kind of matrix, and in it a curve for each layer, coloured by depth."""
    figure = new_figure(12, 6.2)
    panels = figure.subplots(2, 4, sharey=True).ravel()
    colormap = extra("matplotlib", "plot").colormaps["viridis"]
    depth = max(config.layers - 1, 1)
    heads, kv = config.kv_heads * config.q_per_kv * config.head_dim, config.kv_heads * config.head_dim
    outs = {"q": (heads, config.dim), "k": (kv, config.dim), "v": (kv, config.dim), "o": (config.dim, heads)}
    ffn = (config.hidden_dim, config.dim)
    outs |= {"gate": ffn, "up": ffn, "down": ffn[::-1]}
    for axes, (name, found) in zip(panels, kinds.items(), strict=False):
        style(axes, f"{name}, {outs[name][0]:,} × {outs[name][1]:,}")
        for layer, values in found.items():
            axes.plot(np.arange(1, len(values) + 1), values, color=colormap(0.93 * layer / depth), linewidth=1.1)
    style(panels[-1], f"{' and '.join(outer)}, {config.vocab:,} × {config.dim:,}")
    for (name, values), dash in zip(outer.items(), ("-", "--"), strict=False):
        panels[-1].plot(np.arange(1, len(values) + 1), values, dash, color=INK, label=name)
    if len(outer) > 1:
        panels[-1].legend(frameon=False, labelcolor=INK)
    curves = [*outer.values(), *(values for found in kinds.values() for values in found.values())]
    panels[0].set_yscale("log")  # for all; the last few, which are next to nothing, would squeeze the rest
    panels[0].set_ylim(0.5 * min(values[len(values) * 19 // 20] for values in curves) or None)
    figure.supxlabel("rank of the singular value", color=INK, fontsize=10)
    figure.supylabel("singular value", color=INK, fontsize=10)
    figure.suptitle(legible(title), x=0.01, ha="left", color=INK, fontsize=11.5)
    colors: Any = extra("matplotlib.colors", "plot")
    shades = colors.ListedColormap(colormap(np.linspace(0, 0.93, 256)))
    scale = extra("matplotlib.cm", "plot").ScalarMappable(colors.Normalize(0, depth), shades)
    bar = figure.colorbar(scale, ax=panels, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("layer", color=INK)
    bar.ax.yaxis.set_major_locator(extra("matplotlib.ticker", "plot").MaxNLocator(integer=True))
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    return figure
