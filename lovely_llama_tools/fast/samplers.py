"""Samplers that select tokens by bisection, where the library sorts a vocabulary; and `choose`, compiled with them."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt

import lovely_llama
from lovely_llama import Number, Sampling, float32_or_wider, greedy, softmax


def bisect(holds: Callable[[Array], Array], width: int, dtype: Any) -> Int[Array, ""] | UInt[Array, ""]:
    """The largest n of so many bits for which `holds(n)`, true up to some n and false beyond, is true; or 0."""

    def bit(i: Array, n: Array) -> Array:
        higher = n | (jnp.asarray(1 << (width - 1), dtype) >> i.astype(dtype))
        return jnp.where(holds(higher), higher, n)

    return lax.fori_loop(0, width, bit, jnp.asarray(0, dtype))


def largest(x: Float[Array, " vocab"], measure: Num[Array, " vocab"], target: Number) -> Bool[Array, " vocab"]:
    """The smallest set of largest x whose measures sum to at least the target; between equals the lower ids.

    It holds every xᵢ above the cut-off  max {τ : Σᵢ mᵢ [xᵢ ≥ τ] ≥ target}  and as many equal to it as are needed.
    Floats are compared as unsigned integers in the same order, so that bisection is exact."""
    x, ids = float32_or_wider(x), jnp.arange(len(x))
    unsigned, width = (jnp.uint64, 64) if x.dtype == jnp.float64 else (jnp.uint32, 32)
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), unsigned)  # −0 equals 0
    sign = jnp.asarray(1 << (width - 1), unsigned)
    order = jnp.where(bits < sign, bits | sign, ~bits)
    cut = bisect(lambda n: measure.sum(where=order >= n) >= target, width, unsigned)
    above, equal = order > cut, order == cut
    last = bisect(lambda n: measure.sum(where=above | (equal & (ids < n))) < target, len(x).bit_length(), ids.dtype)
    return above | (equal & (ids <= last))


def top_k(logits: Float[Array, " vocab"], k: Number) -> Float[Array, " vocab"]:
    """`lovely_llama.top_k`."""
    return jnp.where(largest(logits, jnp.ones(len(logits), int), k), logits, greedy(logits))


def top_p(logits: Float[Array, " vocab"], p: Number) -> Float[Array, " vocab"]:
    """`lovely_llama.top_p`, but for sums that are closer to p than rounding."""
    return jnp.where(largest(logits, softmax(float32_or_wider(logits)), p) | (p >= 1), logits, greedy(logits))


def categorical(rng: Key[Array, ""], logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """`lovely_llama.categorical`, but for sums that are closer to the number drawn than rounding."""
    p, ids = softmax(float32_or_wider(logits)), jnp.arange(len(logits))
    u = jax.random.uniform(rng, dtype=p.dtype) * p.sum()
    return bisect(lambda n: jnp.where(ids < n, p, 0).sum() <= u, len(p).bit_length(), ids.dtype)


SAMPLERS: dict[str, Callable[[Array, Array, Any], Array]] = {
    **lovely_llama.SAMPLERS,
    "top_k": lambda x, _, k: top_k(x, k),
    "top_p": lambda x, _, p: top_p(x, p),
}


@jax.jit
def choose(
    rng: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " vocab"], seen: Bool[Array, " vocab"],
    sampling: Sampling,
) -> tuple[Int[Array, ""], Bool[Array, " vocab"]]:  # fmt: skip
    """`lovely_llama.choose`, by the samplers above."""
    return lovely_llama.choose(rng, position, logits, seen, sampling, samplers=SAMPLERS, draw=categorical)
