"""Part 6: samplers against their definitions in plain Python."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from asserts import jit
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

import lovely_llama as ll
from lovely_llama_tools.fast import samplers

INF = math.inf
quick = settings(deadline=None, max_examples=100, derandomize=True, database=None)

# ---- Samplers --------------------------------------------------------------------------------------------------------
# Small integers tie, large numbers underflow, and −∞ is a token excluded by an earlier sampler. There are always seven
# logits, so that a sampler is compiled only once, as in `choose`, with its value as an argument.

number = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, width=32, allow_subnormal=False), st.just(-INF))
some_logits = st.lists(number, min_size=7, max_size=7).filter(lambda xs: max(xs) > -INF)
flat, steep = [0.5] * 7, [1e3, -1e3, 999.0, 0.0, 1e3, -INF, 998.5]


greedy, top_k, top_p, min_p = map(jit, (ll.greedy, ll.top_k, ll.top_p, ll.min_p))
categorical, temperature, repetition_penalty = map(jit, (ll.categorical, ll.temperature, ll.repetition_penalty))


@jit
def sampled(sampling: ll.Sampling, logits: jax.Array, seen: jax.Array) -> jax.Array:
    return sampling(logits, seen)


def array(logits: Sequence[float]) -> jax.Array:
    return jnp.array(logits, jnp.float32)


def probabilities(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def likeliest_first(logits: Sequence[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def keep(logits: Sequence[float], kept: Sequence[int]) -> list[float]:
    return [x if i in kept else -INF for i, x in enumerate(logits)]


def smallest_set(logits: Sequence[float], p: float) -> list[int]:
    """The smallest set of likeliest tokens whose probabilities sum to at least p."""
    order, chances = likeliest_first(logits), probabilities(logits)
    sizes = (n for n in range(1, len(order)) if math.fsum(chances[i] for i in order[:n]) >= p)
    return order[: next(sizes, len(order))]


def as_likely(logits: Sequence[float], p: float) -> list[int]:
    return [i for i, x in enumerate(logits) if p == 0 or math.exp(x - max(logits)) >= p]


def cooled(logits: Sequence[float], t: float) -> list[float]:
    below = [x - max(logits) for x in logits]
    return [0.0 if x == 0 else x / t if t else -INF for x in below]


def penalised(logits: Sequence[float], seen: Sequence[bool], penalty: float) -> list[float]:
    return [x if not s else x / penalty if x > 0 else x * penalty for x, s in zip(logits, seen, strict=True)]


def same(got: jax.Array, want: Sequence[float]) -> None:
    np.testing.assert_array_equal(np.asarray(got), np.array(want, np.float32))


def near(got: jax.Array, want: Sequence[float], tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(got), np.array(want), rtol=tolerance, atol=1e-37)


@quick
@given(some_logits)
@example(flat)
@example(steep)
@example([0.0, -0.0, -1.0, 0.0, -2.0, -3.0, -4.0])
def test_greedy_keeps_the_likeliest_and_breaks_ties_by_id(logits: list[float]) -> None:
    same(greedy(array(logits)), keep(logits, likeliest_first(logits)[:1]))


@quick
@given(some_logits, st.integers(1, 9))
@example(flat, 3)
@example(steep, 1)
@example(steep, 7)
def test_top_k_keeps_k_and_breaks_ties_by_id(logits: list[float], k: int) -> None:
    same(top_k(array(logits), k), keep(logits, likeliest_first(logits)[:k]))


@quick
@given(some_logits, st.floats(1e-6, 1))
@example(steep, 0.5)
@example([math.log(0.95), *[math.log(0.05 / 6)] * 6], 0.9)
@example([37.0, *[0.0] * 3, *[-INF] * 3], 1.0)  # whose first three have a sum of 1 in float64
def test_top_p_keeps_the_smallest_set(logits: list[float], p: float) -> None:
    fewer, more = smallest_set(logits, p - 1e-6), smallest_set(logits, p + 1e-6)
    got = top_p(array(logits), p)
    kept = [i for i, x in enumerate(np.asarray(got)) if x > -INF]
    assert {i for i in fewer if logits[i] > -INF} <= set(kept) <= set(more)
    same(got, keep(logits, kept))


@pytest.mark.parametrize("vocab", [49_152, 128_256])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 4.0])
def test_top_p_and_top_k_of_large_vocabularies(vocab: int, spread: float) -> None:
    """The sets of a sort, in float64. With a spread of 0 all are equal; with 1e-3 there are ties of many."""
    rng = np.random.default_rng(vocab)
    logits = np.round(rng.normal(size=vocab) * spread, 3).astype(np.float32)
    order, weights = np.argsort(-logits, kind="stable"), np.exp(logits.astype(np.float64))
    sums = np.cumsum((weights / weights.sum())[order])
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        kept = np.isfinite(np.asarray(top_p(jnp.array(logits), p)))
        fewest, most = (np.searchsorted(sums, p * (1 + rounding)) + 1 for rounding in (-1e-5, 1e-5))
        assert fewest <= kept.sum() <= most
        assert kept[order[: kept.sum()]].all()
    for k in (1, 2, 1000, vocab - 1, vocab):
        kept = np.isfinite(np.asarray(top_k(jnp.array(logits), k)))
        assert kept.sum() == k and kept[order[:k]].all()


@quick
@given(some_logits, st.integers(0, 2**32 - 1))
@example(steep, 3)
def test_categorical_inverts_the_cumulative_distribution(logits: list[float], seed: int) -> None:
    """Of one uniform number; what has been ruled out is never chosen."""
    rng = jax.random.key(seed)
    u, sums = float(jax.random.uniform(rng)), np.cumsum(probabilities(logits))
    assume(np.abs(sums - u).min() > 1e-5)
    assert int(categorical(rng, array(logits))) == np.searchsorted(sums, u)


def test_a_p_of_1_keeps_what_rounding_hides() -> None:
    """In float32 the likeliest of these has all of the probability."""
    assert np.isfinite(np.asarray(ll.top_p(array([0.0, -30.0]), 1.0))).all()


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-30, 1), (0.25, 1), (0.250001, 2), (0.5, 2), (0.7, 3), (0.75, 3), (0.999, 4), (1.0, 4)]
)
def test_top_p_where_the_sums_are_exact(p: float, kept: int) -> None:
    same(ll.top_p(jnp.zeros(4), p), [0.0] * kept + [-INF] * (4 - kept))


@quick
@given(some_logits, st.floats(0, 1))
@example(flat, 1.0)
@example(steep, 1.0)
@example(steep, 0.0)
def test_min_p_keeps_tokens_that_are_likely_enough(logits: list[float], p: float) -> None:
    assume(as_likely(logits, p * (1 - 1e-4)) == as_likely(logits, min(p * (1 + 1e-4), 1)))
    assume(p == 0 or p > 1e-30)
    same(min_p(array(logits), p), keep(logits, as_likely(logits, p)))


@quick
@given(some_logits, st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.0, 1e-40, 1.0])))
@example(flat, 0.0)
@example(steep, 0.0)
@example(steep, 1e-40)
def test_temperature_divides_and_0_is_its_limit(logits: list[float], t: float) -> None:
    near(temperature(array(logits), t), cooled(logits, 0 if t < 1e-38 else t))


@quick
@given(some_logits, st.lists(st.booleans(), min_size=7, max_size=7), st.floats(0.1, 10))
@example(steep, [True] * 7, 1.5)
def test_repetition_penalty_rescales_seen_tokens(logits: list[float], seen: list[bool], penalty: float) -> None:
    near(repetition_penalty(array(logits), jnp.array(seen), penalty), penalised(logits, seen, penalty))


@quick
@given(
    some_logits,
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.sampled_from([0.8, 1.0, 1.3]),
    st.sampled_from([0.0, 1e-40, 0.5, 1.0, 3.0]),
    st.sampled_from([None, 1, 3, 7]),
    st.sampled_from([0.05, 0.45, 0.9, 1.0]),
    st.sampled_from([0.0, 0.07, 0.6]),
)
def test_sampling_applies_the_samplers_in_order(
    logits: list[float], seen: list[bool], penalty: float, t: float, k: int | None, p: float, m: float
) -> None:
    want = penalised(logits, seen, penalty)
    run = sampled if t == 0 or t > 1e-38 else ll.Sampling.__call__  # a program takes 1e-40 for 0
    got = run(ll.Sampling(penalty, t, k, p, m), array(logits), jnp.array(seen))
    if t == 0:
        return near(got, keep(want, likeliest_first(want)[:1]))
    # Logits that differ only by a rounding error may fall on either side of a threshold.
    gaps = [abs(a - b) for a in want for b in want if a != b and INF not in (-a, -b)]
    assume(min(gaps, default=1) > 1e-3)
    want = cooled(want, 0 if t < 1e-38 else t)
    want = keep(want, likeliest_first(want)[:k])
    assume(p == 1 or smallest_set(want, p - 1e-5) == smallest_set(want, p + 1e-5))
    want = keep(want, smallest_set(want, p)) if p < 1 else want
    assume(m == 0 or as_likely(want, m * (1 - 1e-4)) == as_likely(want, m * (1 + 1e-4)))
    near(got, keep(want, as_likely(want, m)), 1e-4)
    return None


@pytest.mark.parametrize(
    ("chances", "sampling", "kept"),
    [
        ([0.5, 0.25, 0.125, 0.125], ll.Sampling(temperature=0.5, top_p=0.7), 1),  # top-p first would keep 2
        ([0.5, 0.25, 0.125, 0.125], ll.Sampling(temperature=1.0, top_k=3, top_p=0.8), 2),  # top-p first: 3
        ([0.4, 0.3, 0.2, 0.1], ll.Sampling(temperature=1.0, top_p=0.75, min_p=0.45), 3),  # min-p first: 2
        ([0.5, 0.25, 0.125, 0.125], ll.Sampling(temperature=2.0, top_p=1.0, min_p=0.6), 2),  # min-p first: 1
    ],
)
def test_the_order_of_samplers_matters(chances: list[float], sampling: ll.Sampling, kept: int) -> None:
    logits = sampling(array([math.log(p) for p in chances]), jnp.zeros(4, bool))
    assert np.isfinite(np.asarray(logits)).tolist() == [True] * kept + [False] * (4 - kept)


def test_sampling_is_at_least_float32() -> None:
    """In bfloat16, dividing by the temperature and by the penalty would each add a rounding error."""
    logits, sampling = array(steep[:5]).astype(jnp.bfloat16), ll.Sampling(1.3, 3.0, None, 1.0)
    got = sampling(logits, jnp.ones(5, bool))
    assert got.dtype == jnp.float32
    near(got, [float(x) for x in sampling(logits.astype(jnp.float32), jnp.ones(5, bool))])


def test_neutral_sampling_only_shifts_logits() -> None:
    logits = array(steep[:5])
    got = ll.Sampling(1.0, 1.0, None, 1.0, 0.0)(logits, jnp.ones(5, bool))
    near(got, cooled(steep[:5], 1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "sampler",
    [
        lambda x: ll.top_k(x, 0), lambda x: ll.top_p(x, 1e-46), lambda x: ll.top_p(x, -1.0), lambda x: ll.min_p(x, 2.0),
        lambda x: samplers.top_k(x, 0), lambda x: samplers.top_p(x, 1e-46), lambda x: samplers.top_p(x, -1.0),
    ],
)  # fmt: skip
def test_the_likeliest_token_stays_whatever_is_asked(sampler: Callable[..., Any], dtype: Any) -> None:
    """Where none remained, token 0 would be drawn."""
    kept = jit(sampler)(jnp.array([0, 3, 3, 1], dtype))
    assert np.isfinite(np.asarray(kept, float)).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1e39), ("repetition_penalty", 1e-46), ("temperature", 1e39), ("temperature", 10**400),
        ("top_p", 1e-46), ("min_p", 1 + 1e-6),
    ],
)  # fmt: skip
def test_values_are_checked_as_the_float32_that_they_become(name: str, value: Any) -> None:
    with pytest.raises(ll.LlamaError) as caught:
        ll.check_sampling(ll.Sampling(**{name: value}), 7)
    assert caught.value.field == name
    ll.check_sampling(ll.Sampling(min_p=1 + 1e-9), 7)


# ---- Drawing a token -------------------------------------------------------------------------------------------------


def draws(logits: Sequence[float], sampling: ll.Sampling, seed: int, positions: Sequence[int]) -> list[int]:
    def draw(position: jax.Array) -> jax.Array:
        return ll.choose(jax.random.key(seed), position, array(logits), jnp.zeros(len(logits), bool), sampling)[0]

    return np.asarray(jax.vmap(draw)(jnp.array(positions))).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        ll.Sampling(temperature=1.0, top_p=1.0),
        ll.Sampling(temperature=2.0, top_p=1.0),
        ll.Sampling(temperature=1.0, top_k=4, top_p=0.9),
        ll.Sampling(temperature=0.7, top_p=1.0, min_p=0.1),
    ],
)
def test_token_frequencies_match_probabilities(sampling: ll.Sampling) -> None:
    logits = [0.3, -1.0, 1.5, 0.0, -2.5, 1.0, 0.9]
    n, chances = 20_000, probabilities(np.asarray(sampling(array(logits), jnp.zeros(7, bool))).tolist())
    counts = np.bincount(draws(logits, sampling, 7, range(n)), minlength=7)
    assert all(counts[i] == 0 for i, p in enumerate(chances) if p == 0)
    surprise = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(chances) if p)
    assert surprise < 22.5, (counts, chances)  # the 99.9 % quantile of χ² with 6 degrees of freedom


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits, sampling = [0.0] * 50, ll.Sampling(temperature=1.0, top_p=1.0)
    first = draws(logits, sampling, 3, range(40))
    assert draws(logits, sampling, 3, range(40)) == first
    assert draws(logits, sampling, 3, range(39, -1, -1)) == first[::-1]
    assert sum(a == b for a, b in zip(draws(logits, sampling, 4, range(40)), first, strict=True)) < 8
    assert len(set(first)) > 20


@pytest.mark.parametrize("t", [0.0, 1e-40])
def test_temperature_0_draws_the_likeliest(t: float) -> None:
    assert set(draws([0.3, -1.0, 1.5, 1.4999, -2.5], ll.Sampling(temperature=t), 0, range(50))) == {2}


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("sampling", [ll.Sampling(), ll.Sampling(temperature=0.0)])
def test_non_finite_logits_yield_no_token(bad: float, sampling: ll.Sampling) -> None:
    assert draws([0.0, 1.0, bad, 2.0], sampling, 0, [5]) == [-1]
    assert draws([bad] * 4, sampling, 0, [5]) == [-1]
    _, seen = ll.choose(jax.random.key(0), jnp.array(5), array([bad] * 4), jnp.zeros(4, bool), sampling)
    assert not seen.any()


@pytest.mark.parametrize("penalty", [1e-40, 1e-38, 3e38])
def test_an_overflowing_penalty_yields_no_token(penalty: float) -> None:
    """A finite logit divided by a finite penalty can be infinite, and ∞ − ∞ = NaN would then be sampled silently."""
    logits, seen = array([-30.0, -20.0, 40.0]), jnp.array([True, True, penalty < 1])
    logits = logits if penalty < 1 else -jnp.abs(logits)
    token, _ = ll.choose(
        jax.random.key(0), jnp.array(0), logits, jnp.ones_like(seen), ll.Sampling(repetition_penalty=penalty)
    )
    assert token == -1


def test_a_chosen_token_is_marked_as_seen() -> None:
    token, seen = ll.choose(
        jax.random.key(0), jnp.array(0), array([0, 9, 1]), jnp.array([True, False, False]), ll.Sampling()
    )
    assert token == 1
    assert seen.tolist() == [True, True, False]


def test_only_the_set_of_samplers_is_compiled() -> None:
    """Other values are arguments: a server's users may all have their own."""
    traced = list[int]()

    @jax.jit
    def draw(logits: jax.Array, sampling: ll.Sampling) -> jax.Array:
        traced.append(1)
        return ll.choose(jax.random.key(0), jnp.array(0), logits, jnp.zeros(4, bool), sampling)[0]

    for temperature, p in ((0.6, 0.9), (0.7, 0.8), (0.0, 0.5), (2.0, 1.0)):
        draw(jnp.arange(4.0), ll.Sampling(temperature=temperature, top_p=p))
    assert len(traced) == 1
    for k in (1, 3, 4):
        draw(jnp.arange(4.0), ll.Sampling(top_k=k))
    assert len(traced) == 2


def test_the_table_of_samplers_is_that_of_sampling() -> None:
    assert ll.Sampling._fields == tuple(ll.SAMPLERS) == tuple(ll.LIMITS)
    ll.check_sampling(ll.Sampling(), 2)
    ll.check_sampling(ll.Sampling(1.5, 0.0, 7, 1.0, 1.0), 7)
