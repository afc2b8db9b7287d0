"""The samplers that bisect, against the library's, which sort: the same tokens, but where rounding decides."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from asserts import jit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

import lovely_llama as ll
from lovely_llama_tools.fast import choose, samplers

quick = settings(deadline=None, max_examples=100, derandomize=True, database=None)
INF = math.inf
ROUNDING = 1e-6  # of a cumulative sum of probabilities

number = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, width=32, allow_subnormal=False), st.just(-INF))
some_logits = st.lists(number, min_size=7, max_size=7).filter(lambda xs: max(xs) > -INF)
flat, steep = [0.5] * 7, [1e3, -1e3, 999.0, 0.0, 1e3, -INF, 998.5]
signed = [0.0, -0.0, -1.0, 0.0, -2.0, -0.0, -4.0]

fast_k, fast_p, fast_draw = map(jit, (samplers.top_k, samplers.top_p, samplers.categorical))
plain_k, plain_p, plain_draw = map(jit, (ll.top_k, ll.top_p, ll.categorical))


def cumulative(logits: jax.Array) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """The sums of probabilities, most likely first, in float64."""
    weights = np.exp(np.asarray(logits, np.float64) - float(logits.max()))
    return np.cumsum(np.sort(weights / weights.sum())[::-1])


def same_set(fast: jax.Array, plain: jax.Array, logits: jax.Array, p: float) -> None:
    """The same tokens remain; or a few more in one, where the sum at the cut is as near to p as rounding."""
    found, expected = (np.isfinite(np.asarray(x)) for x in (fast, plain))
    if (found == expected).all():
        np.testing.assert_array_equal(np.asarray(fast), np.asarray(plain))
        return
    fewer, more = sorted((found, expected), key=np.sum)
    assert (fewer <= more).all(), "neither set holds the other"
    sums = cumulative(logits)[fewer.sum() - 1 : more.sum() - 1]
    assert np.abs(sums - p).max() <= ROUNDING, f"sums {sums} at the cut, expected {p}"


@quick
@given(some_logits, st.integers(1, 7))
@example(flat, 3)
@example(steep, 6)
@example(signed, 3)
def test_top_k(logits: list[float], k: int) -> None:
    x = jnp.array(logits, jnp.float32)
    np.testing.assert_array_equal(np.asarray(fast_k(x, k)), np.asarray(plain_k(x, k)))


@quick
@given(some_logits, st.floats(1e-6, 1))
@example(steep, 0.5)
@example(flat, 3 / 7)
@example([37.0, *[0.0] * 3, *[-INF] * 3], 1.0)
def test_top_p(logits: list[float], p: float) -> None:
    x = jnp.array(logits, jnp.float32)
    same_set(fast_p(x, p), plain_p(x, p), x, p)


@quick
@given(some_logits, st.integers(0, 2**32 - 1))
@example(steep, 3)
def test_categorical(logits: list[float], seed: int) -> None:
    x, rng = jnp.array(logits, jnp.float32), jax.random.key(seed)
    fast, plain = int(fast_draw(rng, x)), int(plain_draw(rng, x))
    if fast != plain:
        weights = np.exp(np.array(logits) - max(logits))
        sums = np.cumsum(weights / weights.sum())[min(fast, plain) : max(fast, plain)]
        assert np.abs(sums - float(jax.random.uniform(rng))).max() <= ROUNDING


@pytest.mark.parametrize("vocab", [49_152, 128_256])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 4.0])
def test_large_vocabularies(vocab: int, spread: float) -> None:
    """With a spread of 0 all are equal; with 1e-3 there are ties of many."""
    x = jnp.array(np.round(np.random.default_rng(vocab).normal(size=vocab) * spread, 3), jnp.float32)
    for k in (1, 1000, vocab - 1, vocab):
        np.testing.assert_array_equal(np.asarray(fast_k(x, k)), np.asarray(plain_k(x, k)))
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1.0):
        same_set(fast_p(x, p), plain_p(x, p), x, p)


@pytest.mark.parametrize("sampling", [ll.Sampling(), ll.Sampling(1.3, 0.8, 3, 0.95, 0.05), ll.Sampling(None, 0.0)])
def test_choose(sampling: ll.Sampling) -> None:
    """With every sampler in its place: the tokens of the library, position by position."""
    logits = jnp.array(np.random.default_rng(0).normal(size=50), jnp.float32)
    seen, rng = jnp.arange(50) % 3 == 0, jax.random.key(7)
    plain = jit(partial(ll.choose, sampling=sampling))
    for position in map(jnp.array, range(40)):
        token, marked = choose(rng, position, logits, seen, sampling)
        want, expected = plain(rng, position, logits, seen)
        assert token == want and (marked == expected).all()
    assert choose(rng, jnp.array(0), logits.at[3].set(jnp.nan), seen, sampling)[0] == -1
