"""Part 2: each function of one vector against llama2.c, float64 formulas and finite differences, and at edge cases."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from asserts import assert_close, assert_finite, jit
from builders import SMALL, Recording
from jax import numpy as jnp
from jax import vmap
from jax.test_util import check_grads
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lovely_llama import (
    Config,
    RopeScaling,
    attend,
    rms_norm,
    rope,
    rope_angles,
    rope_frequencies,
    silu,
    softmax,
    swiglu,
)

Vector = Any  # a numpy array in float64

# ---- Parity with llama2.c: its outer axes are batch, seq and heads; argument names are its own -----------------------


def recorded_rms_norm(args: Mapping[str, Any], config: Config) -> dict[str, jax.Array]:
    return {"0": vmap(vmap(lambda x: rms_norm(x, args["weight"], config.eps)))(args["x"])}


def recorded_rope(args: Mapping[str, Any], config: Config) -> dict[str, jax.Array]:
    def row(x: jax.Array) -> jax.Array:
        angles = vmap(lambda position: rope_angles(position, config))(jnp.arange(len(x)))
        return vmap(lambda heads, angles: vmap(lambda head: rope(head, angles))(heads))(x, angles)

    return {"0": vmap(row)(args["q"]), "1": vmap(row)(args["k"])}


def recorded_feed_forward(args: Mapping[str, Any], config: Config) -> dict[str, jax.Array]:
    gate, down, up = (args[f"w{i}.weight"] for i in (1, 2, 3))
    return {"0": vmap(vmap(lambda x: swiglu(x, gate, up, down)))(args["x"])}


RECORDED_FUNCTIONS = {
    "rms_norm": recorded_rms_norm, "rms_norm_small": recorded_rms_norm, "rope": recorded_rope,
    "feed_forward": recorded_feed_forward,
}  # fmt: skip


@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize("name", RECORDED_FUNCTIONS)
def test_parity(recording: Recording, name: str, what: str) -> None:
    recording.check(name, RECORDED_FUNCTIONS[name], what)


def test_angle_parity(recording: Recording) -> None:
    config = recording.config
    angles = vmap(lambda position: rope_angles(position, config))(jnp.arange(config.ctx))
    table = {"freqs_cos": jnp.cos(angles), "freqs_sin": jnp.sin(angles)}
    assert_close(table, {name: recording.arrays[name] for name in table}, 1e-5)


# ---- The formulas, in numpy and float64 ------------------------------------------------------------------------------


def plain_rms_norm(x: Vector, gain: Vector, eps: float) -> Vector:
    return gain * x / np.sqrt(eps + np.mean(x**2))


def plain_rope(x: Vector, angles: Vector) -> Vector:
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=-1).ravel()


def plain_softmax(scores: Vector) -> Vector:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def plain_attend(q: Vector, keys: Vector, values: Vector, last: int, first: int = 0) -> Vector:
    seen = slice(first, last + 1)
    return plain_softmax(keys[seen] @ q / math.sqrt(len(q))) @ values[seen]


def plain_attend_gradient(q: Vector, keys: Vector, values: Vector, last: int, cotangent: Vector) -> tuple[Vector, ...]:
    """The gradient of ⟨cotangent, attend⟩ with respect to q, keys and values, in closed form."""
    seen, scale = last + 1, 1 / math.sqrt(len(q))
    weights = np.zeros(len(keys))
    weights[:seen] = plain_softmax(keys[:seen] @ q * scale)
    by_scores = weights * (values @ cotangent - cotangent @ (weights @ values))
    return by_scores @ keys * scale, np.outer(by_scores, q) * scale, np.outer(weights, cotangent)


def plain_silu(x: Vector) -> Vector:
    return x / (1 + np.exp(-x))


def plain_swiglu(x: Vector, gate: Vector, up: Vector, down: Vector) -> Vector:
    return down @ (plain_silu(gate @ x) * (up @ x))


def draw(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Vector]:
    """Reproducible, normally distributed float64 arrays."""
    rng = np.random.default_rng(math.prod(sum(shapes, (len(shapes),))))
    return [scale * rng.standard_normal(shape) for shape in shapes]


# The function, its formula, and the shapes of its arguments: different axes have different sizes.
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (partial(rms_norm, eps=0.01), partial(plain_rms_norm, eps=0.01), [(7,), (7,)]),
    "rope": (rope, plain_rope, [(10,), (5,)]),
    "softmax": (softmax, plain_softmax, [(9,)]),
    "attend": (partial(attend, last=11), partial(plain_attend, last=11), [(4,), (13, 4), (13, 4)]),
    "silu": (silu, plain_silu, [(9,)]),
    "swiglu": (swiglu, plain_swiglu, [(7,), (5, 7), (5, 7), (7, 5)]),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_in_float64(name: str, x64: None) -> None:
    function, formula, shapes = FORMULAS[name]
    args = draw(*shapes)
    got = function(*map(jnp.array, args))
    assert got.dtype == jnp.float64
    assert_close(got, formula(*args), 1e-14)


# Only the result is rounded: with any intermediate step in bfloat16 or float16, the error would be several times this.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["rms_norm", "rope", "softmax", "attend", "silu"])
def test_arithmetic_is_float32(name: str, dtype: Any) -> None:
    function, formula, shapes = FORMULAS[name]
    args = [jnp.array(arg, dtype) for arg in draw(*shapes)]
    if name == "rope":
        args[1] = args[1].astype(jnp.float32)
    got, want = function(*args), formula(*(np.asarray(arg, np.float64) for arg in args))
    assert got.dtype == dtype
    half_ulp = 1e-6 if dtype == jnp.float32 else 1.001 * float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=half_ulp, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_swiglu_has_the_dtype_of_its_input(dtype: Any) -> None:
    args = [jnp.array(arg, dtype) for arg in draw(*FORMULAS["swiglu"][2])]
    got = swiglu(*args)
    assert got.dtype == dtype
    want = plain_swiglu(*(np.asarray(arg, np.float64) for arg in args))
    assert_close(got, want, 4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_are_finite_for_large_inputs(name: str) -> None:
    function, _, shapes = FORMULAS[name]

    @jit
    def with_gradient(*args: jax.Array) -> Any:
        out, pull = jax.vjp(function, *args)
        return out, pull(jnp.ones_like(out))

    for args in (draw(*shapes, scale=1e3), *([np.full(shape, far) for shape in shapes] for far in (-1e3, 1e3))):
        assert_finite(with_gradient(*(arg.astype(np.float32) for arg in args)))


LONG, FAR = 286, np.array([-1e3, -1e2, -1, 0, 1, 1e2, 1e3])
DERIVATIVES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (partial(rms_norm, eps=0.01), [(7,), (7,)]),
    "rope": (rope, [(10,), (5,)]),
    "softmax": (lambda x: softmax(x + 1000), [(7,)]),  # the exponentials overflow float64
    "attend": (partial(attend, last=LONG - 9), [(6,), (LONG, 6), (LONG, 6)]),
    "silu": (lambda x: silu(x + FAR), [(7,)]),
    "swiglu": (swiglu, [(5,), (7, 5), (7, 5), (5, 7)]),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_gradient_matches_finite_differences(name: str, x64: None) -> None:
    function, shapes = DERIVATIVES[name]
    f, drawn = jax.jit(function), tuple(map(jnp.array, draw(*shapes, scale=0.5)))
    assert_finite(f(*drawn))  # check_grads would accept NaN on both sides
    check_grads(f, drawn, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


# ---- rms_norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rms_norm_of_small_inputs(dtype: Any) -> None:
    """The square of 1e-4 underflows in float16."""
    x, gain = (jnp.array(a, dtype) for a in (draw((64,), scale=1e-4)[0], 1 + draw((64, 1))[0][:, 0] / 2))
    want = plain_rms_norm(np.asarray(x, np.float64), np.asarray(gain, np.float64), 1e-9)
    assert_close(rms_norm(x, gain, 1e-9), want, float(jnp.finfo(dtype).eps) / 2)


def test_rms_norm_of_zeros() -> None:
    out, pull = jax.vjp(lambda x: rms_norm(x, jnp.ones(7), 1e-5), jnp.zeros(7))
    assert_close((out, pull(jnp.ones(7))), (np.zeros(7), (np.full(7, 1 / math.sqrt(1e-5)),)), 1e-6)


# ---- rope ------------------------------------------------------------------------------------------------------------


def turn(config: Config, x: Vector, positions: Vector) -> jax.Array:
    return vmap(lambda position: rope(jnp.array(x), rope_angles(position, config)))(jnp.array(positions))


def test_rope_at_position_0_is_the_identity() -> None:
    (x,) = draw((SMALL.head_dim,))
    x = x.astype(np.float32)
    assert (np.asarray(turn(SMALL, x, [0])[0]) == x).all()


def test_rope_products_depend_on_distance_alone(x64: None) -> None:
    q, k = draw((SMALL.head_dim,), (SMALL.head_dim,))
    queries, keys = (np.asarray(turn(SMALL, x, np.arange(130))) for x in (q, k))
    products = queries @ keys.T
    for distance in range(-129, 130, 3):
        diagonal = np.diagonal(products, distance)
        assert_close(diagonal, np.full_like(diagonal, diagonal[0]), 1e-12, f"distance {distance}")
    assert_close(np.linalg.norm(queries, axis=-1), np.full(130, np.linalg.norm(q)), 1e-14)
    assert np.ptp(products) > 1


def test_rope_is_half_split_rope_with_rows_permuted(x64: None) -> None:
    """Hugging Face rotates pairs (i, i + d/2). Without the permutation the two agree at position 0 only."""
    (x,) = draw((SMALL.head_dim,))
    evens_first = np.r_[0 : SMALL.head_dim : 2, 1 : SMALL.head_dim : 2]
    for position in (1, 64, 130):
        angles = np.tile(position * np.asarray(rope_frequencies(SMALL)), 2)
        a, b = np.split(x[evens_first], 2)
        half_split = x[evens_first] * np.cos(angles) + np.r_[-b, a] * np.sin(angles)
        assert_close(turn(SMALL, x, [position])[0][evens_first], half_split, 1e-14)


@pytest.mark.parametrize("head_dim", [48, 64, 80, 128])
def test_angles_match_float64(head_dim: int) -> None:
    config = replace(SMALL, head_dim=head_dim, theta=5e5, rope_scaling=None)
    angles_at = jit(partial(rope_angles, config=config))
    x = jnp.array(draw((head_dim,))[0], jnp.bfloat16)
    for position in (257, 4095, 131071):
        exact = position * 5e5 ** (-np.arange(0, head_dim, 2) / head_dim)
        angles = angles_at(jnp.array(position))
        np.testing.assert_array_max_ulp(np.asarray(angles), exact.astype(np.float32), maxulp=2)
        np.testing.assert_array_max_ulp(np.asarray(rope_angles(position, config)), exact.astype(np.float32), maxulp=2)
        # bfloat16 keeps 8 bits of the result, and float32 24 of the angle.
        bound = 2**-8 + 2**-24 * position
        assert_close(rope(x, angles), plain_rope(np.asarray(x, np.float64), exact), bound, f"position {position}")


SCALINGS = {
    "none": None,
    "linear": RopeScaling("linear", 2.5),
    "llama3 8": RopeScaling("llama3", 8.0, 8192, low=1.0, high=4.0),
    "llama3 32": RopeScaling("llama3", 32.0, 8192, low=1.0, high=4.0),
    "yarn 8": RopeScaling("yarn", 8.0, 4096, low=1.0, high=32.0, attention_factor=1.2),
    "yarn short": RopeScaling("yarn", 3.0, 40, low=1.0, high=32.0, attention_factor=1.1),
    "yarn, less than a turn": RopeScaling("yarn", 3.0, 5, low=1.0, high=32.0),
}


def their_frequencies(config: Config) -> Vector:
    """The frequencies that transformers computes for the same scaling."""
    scaling = config.rope_scaling
    described: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": config.theta}
    if scaling:
        described |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_ctx}
        if scaling.kind == "llama3":
            described |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        if scaling.kind == "yarn":
            described |= {"beta_slow": scaling.low, "beta_fast": scaling.high}
    theirs = LlamaConfig(head_dim=config.head_dim, max_position_embeddings=config.ctx, rope_parameters=described)  # pyright: ignore[reportCallIssue]
    default = LlamaRotaryEmbedding.compute_default_rope_parameters
    make = ROPE_INIT_FUNCTIONS[scaling.kind] if scaling else default
    return make(theirs, device=torch.device("cpu"))[0].numpy()


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [10, 48, 64, 128])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_match_transformers(
    name: str, head_dim: int, theta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1 ulp of float32, once transformers computes powers in float64; in float32 it is off by up to 26 ulp."""
    config = replace(SMALL, head_dim=head_dim, theta=theta, rope_scaling=SCALINGS[name], ctx=2**17)
    frequencies = np.asarray(rope_frequencies(config))
    np.testing.assert_allclose(frequencies, their_frequencies(config), rtol=4e-6)
    for dtype in ("float", "float32"):
        monkeypatch.setattr(torch, dtype, torch.float64)
    np.testing.assert_array_max_ulp(frequencies, their_frequencies(config).astype(np.float32), maxulp=1)


def kept(config: Config) -> Vector:
    """κ, recovered from `rope_frequencies`: 1 for an unscaled pair, 0 for one slowed by the whole factor."""
    assert config.rope_scaling
    ratio = np.asarray(rope_frequencies(config)) / config.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    return (ratio - 1 / config.rope_scaling.factor) / (1 - 1 / config.rope_scaling.factor)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_bands(factor: float, x64: None) -> None:
    """By wavelength: unscaled up to ctx / high, slowed beyond ctx / low, and linear in 1 / wavelength between."""
    scaling = RopeScaling("llama3", factor, 8192, low=1.0, high=4.0)
    config = replace(SMALL, head_dim=128, theta=5e5, rope_scaling=scaling)
    wavelength = 2 * math.pi * 5e5 ** (np.arange(0, 128, 2) / 128)
    bands = [wavelength < 8192 / 4, (wavelength >= 8192 / 4) & (wavelength <= 8192), wavelength > 8192]
    assert [band.sum() for band in bands] == [29, 6, 29]
    want = np.select(bands, [np.ones(64), (8192 / wavelength - 1) / 3, np.zeros(64)])
    np.testing.assert_allclose(kept(config), want, atol=1e-12)


def test_yarn_ramp(x64: None) -> None:
    """Fast pairs stay unscaled and slow pairs are slowed, not the other way round."""
    scaling = RopeScaling("yarn", 8.0, 4096, low=1.0, high=32.0)
    ramp = kept(replace(SMALL, head_dim=128, theta=1e4, rope_scaling=scaling))
    # In 4096 positions, pair 20.9 would make 32 turns and pair 45.03 one turn.
    assert abs(ramp[: 20 + 1] - 1).max() < 1e-12 and abs(ramp[46:]).max() < 1e-12
    np.testing.assert_allclose(np.diff(ramp[20:47]), -1 / 26, atol=1e-12)


# ---- softmax and silu ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [[0.0, 1.0, -2.0], [1e3, -1e3, 999.0], [-1e3, -1e3, -1e3], [-math.inf, 0.5, -math.inf, 1.5], [-math.inf, 7.0]],
)
def test_softmax(scores: list[float]) -> None:
    assert_close(softmax(jnp.array(scores)), plain_softmax(np.array(scores)), 1e-6)


def test_silu_gradient_for_large_inputs() -> None:
    """The gradient of x / (1 + exp(−x)) is NaN at −100."""
    assert_close(
        vmap(jax.grad(lambda x: silu(x[None])[0]))(jnp.array([-1e3, -100.0, 1e3])), np.array([0, 0, 1.0]), 1e-6
    )


# ---- attend ----------------------------------------------------------------------------------------------------------

CTX = 150
SPANS = [(0, 0), (0, 1), (0, 63), (0, 64), (0, CTX - 1), (1, 90), (37, 90), (90, 90), (CTX - 1, CTX - 1)]


@pytest.mark.parametrize(("first", "last"), SPANS)
def test_attend(first: int, last: int) -> None:
    """Value and gradients match the formula, over the keys at first … last; the others have no effect, bit for bit."""

    @jit
    def with_gradient(last: jax.Array, first: jax.Array, cotangent: jax.Array, *args: jax.Array) -> Any:
        out, pull = jax.vjp(partial(attend, last=last, first=first), *args)
        return out, pull(cotangent)

    q, keys, values, cotangent = (a.astype(np.float32) for a in draw((6,), (CTX, 6), (CTX, 6), (6,)))
    visible = slice(first, last + 1)
    exact = [np.asarray(a, np.float64) for a in (q, keys[visible], values[visible])]
    out, grads = with_gradient(last, first, cotangent, q, keys, values)
    assert_close(out, plain_attend(*exact, last=last - first), 1e-5)
    by_q, *by_rows = plain_attend_gradient(*exact, last=last - first, cotangent=cotangent)
    padded = [np.pad(rows, ((first, CTX - 1 - last), (0, 0))) for rows in by_rows]
    if first == last:  # one key has the weight 1, whatever it is
        assert max(abs(grads[0]).max(), abs(grads[1]).max()) < 1e-6
        assert_close(grads[2], padded[1], 1e-6)
    else:
        assert_close(grads, (by_q, *padded), 5e-5)
    hidden = np.ones((CTX, 1), np.float32)
    hidden[visible] = 0
    other = with_gradient(last, first, cotangent, q, keys + 9 * hidden, values - 9 * hidden)[0]
    assert (np.asarray(other) == np.asarray(out)).all()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_attend_with_large_scores(scale: float) -> None:
    """With scores in the millions, and with all scores equal, the result is still an average of the values."""
    q, keys, values = draw((6,), (CTX, 6), (CTX, 6))
    q, keys = (scale * a for a in (q, keys))
    want = plain_attend(*(a.astype(np.float32).astype(np.float64) for a in (q, keys, values)), CTX - 1)
    args = [jnp.array(arg, jnp.float32) for arg in (q, keys, values)]
    assert_close(attend(*args, last=CTX - 1), want, 1e-5)
    even = attend(jnp.zeros(6), args[1], args[2], CTX - 1)
    assert_close(even, values.mean(axis=0), 1e-5)
