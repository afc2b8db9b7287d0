"""The picture of rotary embeddings: wavelengths under each scaling, and how q·k decays with distance."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from lovely_llama import Config, RopeScaling, rope, rope_angles, rope_frequencies

from ..devices.programs import Program
from ..extras import counted
from .style import COLOURS, INK, legible, new_figure, style

POINTS = 120  # of a curve, spaced evenly on a logarithmic axis
FARTHEST = 2**24  # positions beyond are no longer exact in float32
DASHES = ("-", "--", "-.", ":")


def scalings(config: Config) -> dict[str, RopeScaling | None]:
    """Every kind of scaling, with the config's own factor and original context where it has them.

    Otherwise the factor is 8 and the original context is the config's. The other numbers are those of Llama 3.1, and
    those that arXiv:2309.00071, §3.2, recommends for Llama."""
    own = config.rope_scaling
    factor, original = (own.factor, own.original_ctx) if own else (8.0, config.ctx)
    original = original or round(config.ctx / factor)
    made: dict[str, RopeScaling | None] = {
        "none": None,
        "linear": RopeScaling("linear", factor),
        "llama3": RopeScaling("llama3", factor, original, low=1.0, high=4.0),
        "yarn": RopeScaling("yarn", factor, original, low=1.0, high=32.0),
    }
    return made | ({own.kind: own} if own else {})


def products(config: Config, distances: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """⟨R x, R′x⟩ / ⟨x, x⟩ at each distance, for an x as long in one plane as in another.

    It is ¹⁄ₙ Σᵢ cos(m fᵢ) over the n pairs: what a random query and an equal key have on average."""

    def product(distance: Int[Array, ""]) -> Float[Array, ""]:
        x = jnp.ones(config.head_dim)
        return jnp.vdot(x, rope(x, rope_angles(distance, config))) / config.head_dim

    return np.asarray(Program(jax.vmap(product))(jnp.asarray(distances, jnp.int32)))


def decay(config: Config, distances: Int[np.ndarray, " n"]) -> Float[np.ndarray, "3 n"]:
    """The least, the mean and the largest of the products at distances up to an eighth away from each."""
    near = np.rint(distances[:, None] * np.linspace(7 / 8, 9 / 8, 33)).astype(np.int32)
    found = products(config, near.ravel()).reshape(near.shape)
    return np.stack([found.min(axis=1), found.mean(axis=1), found.max(axis=1)])


def draw_rope(config: Config, name: str) -> Any:
    """A figure: wavelengths by pair on the left, decay by distance on the right, a curve for each scaling."""
    kinds, figure = scalings(config), new_figure(9.4, 4.4)
    left, right = figure.subplots(1, 2)
    style(left, "Wavelength of each rotary pair", "pair i", "positions for a full turn, 2π / fᵢ")
    style(right, "q·k of a query and an equal key", "distance m (positions)", "¹⁄ₙ Σ cos(m fᵢ)")
    factor, original = next((s.factor, s.original_ctx) for s in kinds.values() if s and s.original_ctx)
    extended = config.ctx if config.rope_scaling else round(factor * original)
    distances = np.unique(np.geomspace(1, min(extended, FARTHEST), POINTS).astype(np.int32))
    for (kind, scaling), colour, dash in zip(kinds.items(), COLOURS, DASHES, strict=False):
        scaled, own = replace(config, rope_scaling=scaling), scaling == config.rope_scaling
        line = {"color": colour, "linewidth": 3 if own else 1.6, "label": kind + " (the model's)" * own}
        left.plot(2 * math.pi / np.asarray(rope_frequencies(scaled)), "-" if own else dash, **line)
        least, mean, largest = decay(scaled, distances)
        if scaling in (None, config.rope_scaling):  # more would hide each other
            right.fill_between(distances, least, largest, color=colour, alpha=0.15, linewidth=0)
        right.plot(distances, mean, "-" if own else dash, **line)
    left.set_yscale("log")
    right.set_xscale("log")
    for length, what in ((original, "original context"), (extended, "extended context")):
        ink = {"color": INK, "linewidth": 0.8, "linestyle": (0, (4, 3))}
        left.axhline(length, **ink)
        right.axvline(length, **ink)
        left.text(0, length * 1.1, f"{what}, {length:,}", color=INK, fontsize=8.5, va="bottom")
    left.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower right", title="scaling")
    about = f"{name}: {counted(config.head_dim // 2, 'pair')}, θ = {config.theta:,g}; scaled by {factor:g}"
    figure.suptitle(legible(about), x=0.01, ha="left", color=INK, fontsize=11.5)
    return figure
