"""Part 7, choosing: samplers against their definitions in plain Python, texts against the model without a cache."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import assert_close, random_params
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

import lovely_llama as ll

INF = math.inf
quick = settings(deadline=None, max_examples=100, derandomize=True, database=None)

# ---- Samplers --------------------------------------------------------------------------------------------------------
# Small numbers make ties, large ones underflow, −∞ is what an earlier sampler left. Seven of them: one compilation.

number = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, width=32, allow_subnormal=False), st.just(-INF))
some_logits = st.lists(number, min_size=7, max_size=7).filter(lambda xs: max(xs) > -INF)
flat, steep = [0.5] * 7, [1e3, -1e3, 999.0, 0.0, 1e3, -INF, 998.5]


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
    """As many of the likeliest as together have at least p, and no more."""
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
def test_greedy_keeps_the_first_of_the_likeliest(logits: list[float]) -> None:
    same(ll.greedy(array(logits)), keep(logits, likeliest_first(logits)[:1]))


@quick
@given(some_logits, st.integers(1, 9))
@example(flat, 3)
@example(steep, 1)
@example(steep, 7)
def test_top_k_keeps_k_of_which_the_lower_of_equals(logits: list[float], k: int) -> None:
    same(ll.top_k(array(logits), k), keep(logits, likeliest_first(logits)[:k]))


@quick
@given(some_logits, st.floats(1e-6, 1))
@example(steep, 0.5)
@example([math.log(0.95), *[math.log(0.05 / 6)] * 6], 0.9)
def test_top_p_keeps_the_smallest_set(logits: list[float], p: float) -> None:
    fewer, more = smallest_set(logits, p - 1e-6), smallest_set(logits, min(p + 1e-6, 1))
    got = ll.top_p(array(logits), p)
    kept = [i for i, x in enumerate(np.asarray(got)) if x > -INF]
    assert {i for i in fewer if logits[i] > -INF} <= set(kept) <= set(more)
    same(got, keep(logits, kept))


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
def test_min_p_keeps_what_is_likely_enough(logits: list[float], p: float) -> None:
    assume(as_likely(logits, p * (1 - 1e-4)) == as_likely(logits, min(p * (1 + 1e-4), 1)))
    assume(p == 0 or p > 1e-30)
    same(ll.min_p(array(logits), p), keep(logits, as_likely(logits, p)))


@quick
@given(some_logits, st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.0, 1e-40, 1.0])))
@example(flat, 0.0)
@example(steep, 0.0)
@example(steep, 1e-40)
def test_temperature_divides_and_has_its_limit_at_0(logits: list[float], t: float) -> None:
    near(ll.temperature(array(logits), t), cooled(logits, 0 if t < 1e-38 else t))


@quick
@given(some_logits, st.lists(st.booleans(), min_size=7, max_size=7), st.floats(0.1, 10))
@example(steep, [True] * 7, 1.5)
def test_repetition_penalty_makes_what_was_seen_less_likely(
    logits: list[float], seen: list[bool], penalty: float
) -> None:
    near(ll.repetition_penalty(array(logits), jnp.array(seen), penalty), penalised(logits, seen, penalty))


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
def test_sampling_is_the_samplers_in_order(
    logits: list[float], seen: list[bool], penalty: float, t: float, k: int | None, p: float, m: float
) -> None:
    want = penalised(logits, seen, penalty)
    got = ll.Sampling(penalty, t, k, p, m)(array(logits), jnp.array(seen))
    if t == 0:
        return near(got, keep(want, likeliest_first(want)[:1]))
    # Two that differ by a rounding may end on either side of a bound.
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
def test_the_order_matters(chances: list[float], sampling: ll.Sampling, kept: int) -> None:
    logits = sampling(array([math.log(p) for p in chances]), jnp.zeros(4, bool))
    assert np.isfinite(np.asarray(logits)).tolist() == [True] * kept + [False] * (4 - kept)


def test_sampling_is_in_float32_at_least() -> None:
    """A bfloat16 divided by 3 is off by up to 2⁻⁹, and a penalty's quotient as much."""
    logits, sampling = array(steep[:5]).astype(jnp.bfloat16), ll.Sampling(1.3, 3.0, None, 1.0)
    got = sampling(logits, jnp.ones(5, bool))
    assert got.dtype == jnp.float32
    near(got, [float(x) for x in sampling(logits.astype(jnp.float32), jnp.ones(5, bool))])


def test_sampling_that_changes_nothing_changes_nothing() -> None:
    logits = array(steep[:5])
    got = ll.Sampling(1.0, 1.0, None, 1.0, 0.0)(logits, jnp.ones(5, bool))
    near(got, cooled(steep[:5], 1))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("repetition_penalty", [0, -1, INF, math.nan]),
        ("temperature", [-1e-9, INF, math.nan]),
        ("top_k", [0, -1, 8]),
        ("top_p", [0, -0.1, 1.001, math.nan]),
        ("min_p", [-0.1, 1.001, math.nan]),
    ],
)
def test_sampling_refuses_what_is_not_defined(field: str, values: list[float]) -> None:
    ll.Sampling(1.5, 0.0, 7, 1.0, 1.0).check(7)
    for value in values:
        fields: dict[str, Any] = {field: value if field == "top_k" else float(value)}
        with pytest.raises(ll.LlamaError, match=f"^arguments: {field}: got .*, expected ") as caught:
            ll.Sampling(**fields).check(7)
        assert caught.value.field == field


# ---- The choice ------------------------------------------------------------------------------------------------------


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
def test_tokens_come_as_often_as_they_are_likely(sampling: ll.Sampling) -> None:
    logits = [0.3, -1.0, 1.5, 0.0, -2.5, 1.0, 0.9]
    n, chances = 20_000, probabilities(np.asarray(sampling(array(logits), jnp.zeros(7, bool))).tolist())
    counts = np.bincount(draws(logits, sampling, 7, range(n)), minlength=7)
    assert all(counts[i] == 0 for i, p in enumerate(chances) if p == 0)
    surprise = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(chances) if p)
    assert surprise < 22.5, (counts, chances)  # χ² with 6 degrees of freedom is above in one of 1000 cases


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits, sampling = [0.0] * 50, ll.Sampling(temperature=1.0, top_p=1.0)
    first = draws(logits, sampling, 3, range(40))
    assert draws(logits, sampling, 3, range(40)) == first
    assert draws(logits, sampling, 3, range(39, -1, -1)) == first[::-1]
    assert sum(a == b for a, b in zip(draws(logits, sampling, 4, range(40)), first, strict=True)) < 8
    assert len(set(first)) > 20


@pytest.mark.parametrize("t", [0.0, 1e-40])
def test_no_temperature_is_the_likeliest(t: float) -> None:
    assert set(draws([0.3, -1.0, 1.5, 1.4999, -2.5], ll.Sampling(temperature=t), 0, range(50))) == {2}


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("sampling", [ll.Sampling(), ll.Sampling(temperature=0.0)])
def test_logits_that_are_not_finite_choose_nothing(bad: float, sampling: ll.Sampling) -> None:
    assert draws([0.0, 1.0, bad, 2.0], sampling, 0, [5]) == [-1]
    assert draws([bad] * 4, sampling, 0, [5]) == [-1]


@pytest.mark.parametrize("penalty", [1e-40, 1e-38, 3e38])
def test_a_penalty_that_overflows_chooses_nothing(penalty: float) -> None:
    """Finite logits and a finite penalty may have an infinite quotient: ∞ − ∞ would then be drawn from in silence."""
    logits, seen = array([-30.0, -20.0, 40.0]), jnp.array([True, True, penalty < 1])
    logits = logits if penalty < 1 else -jnp.abs(logits)
    token, _ = ll.choose(
        jax.random.key(0), jnp.array(0), logits, jnp.ones_like(seen), ll.Sampling(repetition_penalty=penalty)
    )
    assert token == -1


def test_what_is_chosen_is_seen() -> None:
    token, seen = ll.choose(
        jax.random.key(0), jnp.array(0), array([0, 9, 1]), jnp.array([True, False, False]), ll.Sampling()
    )
    assert token == 1
    assert seen.tolist() == [True, True, False]


# ---- Texts -----------------------------------------------------------------------------------------------------------

GREEDY, HOT = ll.Sampling(temperature=0.0), ll.Sampling(temperature=2.0, top_p=1.0)
CONFIG = ll.Config(61, 24, 2, 2, 3, 4, 40, 2048, 1e-5, 1e4, None, False)
# Controls, letters, whole characters, and the bytes of é, 日 and 😀: many orders of them are no UTF-8.
PIECES = [
    b"", b"", *(bytes([c]) for c in b"abcdefghij "), "ñandú".encode(), b"\xc3", b"\xa9", b"\xe6\x97", b"\xa5",
    b"\xf0", b"\x9f\x98", b"\x80", b"s\xc3", b"the ", b"\n", *(b"%d" % i for i in range(37)),
]  # fmt: skip


def tokenizer(pieces: Sequence[bytes], stops: Sequence[int] = (), prefix: bytes = b"") -> ll.Tokenizer:
    def encode(text: str, special: bool) -> list[int]:
        return [pieces.index(character.encode()) for character in text]

    return ll.Tokenizer(encode, pieces, {"<s>": 0, "</s>": 1}, frozenset(stops), 0, True, prefix, None)


@pytest.fixture(scope="module")
def model() -> ll.Model:
    return ll.Model(CONFIG, random_params(CONFIG), tokenizer(PIECES))


def counter(pieces: Sequence[bytes], stops: Sequence[int] = (), ctx: int = 64) -> ll.Model:
    """A Llama that counts: after token t comes t + 1. Its layers add nothing; an embedding is one-hot."""
    vocab = 32
    config = ll.Config(vocab, vocab, 1, 1, 1, 2, 3, ctx, 1e-5, 1e4, None, False)
    params, eye = jax.tree.map(lambda w: jnp.zeros(w.shape), ll.shapes(config)), jnp.eye(vocab)
    params = params._replace(embed=eye, norm=jnp.ones(vocab), unembed=jnp.roll(eye, 1, axis=0))
    padded = [b"", *pieces, *[b"~"] * (vocab - 1 - len(pieces))]
    return ll.Model(config, params, tokenizer(padded, stops))


def script(text: Sequence[bytes], stop: Sequence[str] = (), **options: Any) -> ll.Generation:
    """What is generated by a model that says these pieces."""
    return ll.generate(counter(text), [0], len(text), GREEDY, stop=stop, **options)


def test_a_stream_is_the_text_of_its_tokens(model: ll.Model) -> None:
    for seed in range(12):
        generation = ll.generate(model, "abc", 40, HOT, seed)
        parts = list(generation)
        assert len(generation.tokens) == 40
        assert "".join(parts) == model.tokenizer.decode(generation.tokens)
        assert all(parts)


@pytest.mark.parametrize(("prompt", "text"), [([0], "the very end"), ([0, 1], " very end"), ([1, 2], " end")])
def test_a_prompt_and_what_is_streamed_after_it_are_the_text_of_all_tokens(prompt: list[int], text: str) -> None:
    """SentencePiece puts a space before every text, which is no part of it: after a prompt of BOS alone neither."""
    model = counter([b" the", b" very", b" end"])
    model = model._replace(tokenizer=model.tokenizer._replace(prefix=b" "))
    generation = ll.generate(model, prompt, 4 - len(prompt) - prompt[0], GREEDY)
    assert "".join(generation) == text
    assert model.tokenizer.decode(prompt) + text == model.tokenizer.decode([*prompt, *generation.tokens])


def test_characters_come_whole() -> None:
    said = list(script([b"a\xc3", b"\xa9\xe6", b"\x97", b"\xa5", b"\xf0", b"\x9f\x98", b"\x80z"]))
    assert said == ["a", "é", "日", "😀z"]


def test_bytes_that_are_no_character_are_replaced() -> None:
    for pieces in ([b"\xc3", b"a"], [b"a", b"\xf0\x9f"], [b"\xa9", b"\xff"], [b"\xe6\x97", b"\xc3", b"\xa9"]):
        assert "".join(script(pieces)) == b"".join(pieces).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        ("aaab", ["aab"], "a"),  # a matcher that starts over on a mismatch does not see it
        ("aabaac", ["aac"], "aab"),
        ("hello world", ["world", "lo"], "hel"),
        ("hello world", ["planet", "word"], "hello world"),
        ("ab", ["abc"], "ab"),
        ("ab", ["a"], ""),
        (["x", "xyz", "z"], ["y"], "xx"),
        (["ab", "cd", "ef"], ["f", "bc", "d"], "a"),
        (["ab", "cd"], ["cd", "bcd"], "a"),
        (["a", b"\xc3", b"\xa9", "b"], ["é"], "a"),
        (["a", b"\xc3", b"\xa9", "b"], ["éb"], "a"),
    ],
)
def test_a_stop_ends_the_text_before_it(pieces: Sequence[str | bytes], stop: list[str], text: str) -> None:
    said = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    generation = script(said, stop)
    assert "".join(generation) == text
    assert generation.reason == ("length" if text.encode() == b"".join(said) else "stop")


@settings(quick, max_examples=60)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=9),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=2),
)
def test_a_stop_is_found_wherever_tokens_end(pieces: list[str], stop: list[str]) -> None:
    sofar = ["".join(pieces[: n + 1]) for n in range(len(pieces))]
    stopped = next((text for text in sofar if any(end in text for end in stop)), None)
    want = sofar[-1] if stopped is None else stopped[: min(stopped.index(end) for end in stop if end in stopped)]
    generation = script([piece.encode() for piece in pieces], stop)
    assert "".join(generation) == want
    assert generation.reason == ("length" if stopped is None else "stop")


def test_a_stop_token_ends_and_is_not_said() -> None:
    for stops, stop in (([3], []), ([], ["</s>"])):
        model = counter([b"a", b"b", b"c", b"d"], stops)
        specials = {"</s>": 3}
        model = model._replace(tokenizer=model.tokenizer._replace(specials=specials))
        generation = ll.generate(model, [0], 4, GREEDY, stop=stop)
        assert ("".join(generation), generation.tokens, generation.reason) == ("ab", [1, 2], "stop")


@pytest.mark.parametrize(
    ("prompt", "max_new", "said", "reason"),
    [
        (1, 0, 0, "length"),
        (1, 3, 3, "length"),
        (1, None, 15, "context"),
        (15, None, 1, "context"),
        (16, 9, 0, "context"),
    ],
)
def test_why_it_ended(prompt: int, max_new: int | None, said: int, reason: str) -> None:
    generation = ll.generate(counter([], ctx=16), [0] * prompt, max_new, GREEDY)
    assert len(list(generation)) == said == len(generation.tokens)
    assert generation.reason == reason


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("prompt", {"prompt": "a\ud800"}),
        ("prompt", {"prompt": "a" * 10**6}),
        ("tokens", {"prompt": [CONFIG.vocab]}),
        ("temperature", {"sampling": ll.Sampling(temperature=-1.0)}),
        ("max_new", {"max_new": -1}),
        ("max_new", {"max_new": CONFIG.ctx + 1}),
        ("seed", {"seed": 2**32}),
        ("stop", {"stop": [""]}),
        ("stop", {"stop": ["a", "\ud800"]}),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_door(model: ll.Model, field: str, wrong: dict[str, Any]) -> None:
    """When it is asked for, before anything is generated; test_faults.py has all of it."""
    with pytest.raises(ll.LlamaError) as caught:
        options: dict[str, Any] = {"prompt": "abc", "max_new": 1} | wrong
        ll.generate(model, **options)
    assert caught.value.field == field


def test_logits_that_are_not_finite_end_a_generation(model: ll.Model) -> None:
    broken = model._replace(params=model.params._replace(norm=model.params.norm * math.nan))
    with pytest.raises(FloatingPointError, match="position 3"):
        next(ll.generate(broken, "abc", 1))


def test_it_is_timed_from_the_beginning_to_each_token() -> None:
    begun, generation = time.perf_counter(), script([b"a"] * 5)
    assert "".join(generation) == "aaaaa"
    assert len(generation.times) == 6
    assert [begun, *generation.times] == sorted([*generation.times, begun])


def test_one_seed_is_one_text(model: ll.Model) -> None:
    def text(seed: int, **options: Any) -> str:
        return "".join(ll.generate(model, "abc", 30, HOT, seed, **options))

    assert text(5) == text(5) == text(5, session=ll.Session(model))
    assert len({text(seed) for seed in (0, 1, 2, 2**32 - 1)}) == 4


# ---- With a cache and without ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(1).integers(0, CONFIG.vocab, 1300).tolist()


@pytest.fixture(scope="module")
def uncached(model: ll.Model, tokens: list[int]) -> np.ndarray[Any, Any]:
    """The logits after every token, from one call with no cache."""
    return np.asarray(jax.jit(ll.logits, static_argnums=2)(model.params, jnp.array(tokens), CONFIG))


def test_every_token_to_the_limit_is_the_likeliest_without_a_cache(tokens: list[int]) -> None:
    config = replace(CONFIG, ctx=90, layers=1)
    model = ll.Model(config, random_params(config), tokenizer(PIECES))
    for n in (1, 30, 64, 89):
        generation = ll.generate(model, tokens[:n], None, GREEDY)
        text = "".join(generation)
        assert generation.reason == "context"
        assert text == model.tokenizer.decode(generation.tokens)
        every = [*tokens[:n], *generation.tokens]
        assert len(every) == config.ctx
        logits = np.asarray(jax.jit(ll.logits, static_argnums=2)(model.params, jnp.array(every), config))
        for position in range(n - 1, config.ctx - 1):
            assert logits[position, every[position + 1]] >= logits[position].max() - 1e-4, position


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 255, 256, 257, 600, 1100])
def test_a_prompt_is_read_in_pieces(model: ll.Model, tokens: list[int], uncached: Any, length: int) -> None:
    session = ll.Session(model)
    assert_close(session.feed(tokens[:length]), uncached[length - 1], 1e-5, f"logits after {length}")
    assert_close(session.feed(tokens[length : length + 1]), uncached[length], 1e-5, f"logits after {length + 1}")
    assert session.tokens == tokens[: length + 1]


def test_a_cache_that_grows_forgets_nothing(model: ll.Model, tokens: list[int], uncached: Any) -> None:
    session, rooms = ll.Session(model), list[int]()
    for first, last in ((0, 600), (600, 900), (900, 901), (901, 1030), (1030, 1300)):
        assert_close(session.feed(tokens[first:last]), uncached[last - 1], 1e-5, f"logits after {last}")
        rooms.append(session.room)
        assert last + 64 <= session.room <= CONFIG.ctx + 64
        assert {keys.shape[1] for keys, _ in session.cache} == {session.room}
    assert len(set(rooms)) > 1


def test_a_cache_ends_with_the_context(model: ll.Model, tokens: list[int], uncached: Any) -> None:
    """Padding is written behind the last token. Written past the cache's end, it would move back over what is there."""
    config = replace(CONFIG, ctx=1101)
    session = ll.Session(model._replace(config=config))
    assert_close(session.feed(tokens[:1101]), uncached[1100], 1e-5, "logits after the last")
    assert session.room == 1101 + ll.PREFILL[-1]


def test_a_session_keeps_what_prompts_share(model: ll.Model, tokens: list[int], uncached: Any) -> None:
    session = ll.Session(model)
    session.feed(session.rewind(tokens[:300]))
    other = [*tokens[:200], *tokens[500:650]]
    new = session.rewind(other)
    assert new == other[200:]
    assert_close(session.feed(new), ll.Session(model).feed(other), 1e-5, "a prompt that goes on differently")
    assert session.rewind(other) == other[-1:]
    assert_close(session.feed(other[-1:]), ll.Session(model).feed(other), 1e-5, "the same prompt")
    assert session.rewind(tokens[:100]) == tokens[99:100]
    assert_close(session.feed(tokens[99:100]), uncached[99], 1e-5, "the beginning alone")


def test_a_session_gives_the_texts_of_fresh_ones(model: ll.Model) -> None:
    session, sampling = ll.Session(model), HOT
    for prompt in ("abc", "abcabc", "b" * 100, "abc"):
        fresh = "".join(ll.generate(model, prompt, 12, sampling, 1))
        assert "".join(ll.generate(model, prompt, 12, sampling, 1, session=session)) == fresh


def test_a_session_outlives_an_interruption(model: ll.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers one has already written into its cache, which is not there any more."""
    session, layer, calls = ll.Session(model), ll.read_layer, list[int]()

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return layer(*args)

    fresh = "".join(ll.generate(model, "abc", 12, HOT, 1))
    monkeypatch.setattr(ll, "read_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        "".join(ll.generate(model, "abc", 12, HOT, 1, session=session))
    assert session.tokens
    assert "".join(ll.generate(model, "abc", 12, HOT, 1, session=session)) == fresh


def test_a_new_length_is_no_new_program(model: ll.Model, tokens: list[int]) -> None:
    programs = ll.read_tokens, ll.read_layer, ll.read_out

    def size() -> list[int]:
        return [program._cache_size() for program in programs]  # pyright: ignore

    for length in (512, 256, 64, 1):
        ll.Session(model).feed(tokens[:length])
    before = size()
    for length in (2, 3, 17, 63, 65, 129, 255, 300, 511, 513, 700, 899):
        ll.Session(model).feed(tokens[:length])
    assert size() == before
    list(ll.generate(model, tokens[:77], 5))
    assert size() == before
