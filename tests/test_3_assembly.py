"""Part 3: attention, the block and the whole model, against llama2.c and finite differences, and for consistency."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from asserts import assert_close, assert_finite, jit
from builders import SMALL, Recording, layers_of, random_params
from jax import numpy as jnp
from jax import vmap
from jax.test_util import check_grads

from lovely_llama import (
    Attention,
    Block,
    Cache,
    Config,
    LlamaError,
    Params,
    RopeScaling,
    attention,
    block,
    empty_cache,
    llama,
    logits,
    loss,
    positions,
    shapes,
)
from lovely_llama_tools.formats.layout import LLAMA2C, all_tensors
from lovely_llama_tools.formats.llama2c import from_llama2c

PARAMS = random_params(SMALL)
TOKENS = jnp.array([3, 28, 0, 17, 3, 9, 21])
run = jit(llama, static_argnames="config")  # `start` is traced: one program serves all
whole = jit(logits, static_argnames="config")


# ---- Parity with llama2.c --------------------------------------------------------------------------------------------


def recorded_block(args: Mapping[str, Any], prefix: str, config: Config) -> Block:
    """A block from recorded arguments, by way of the loader, which needs the rest of a model too."""
    rest = {name: np.zeros(shape, np.float32) for name, shape in all_tensors(LLAMA2C, config).items()}
    given = {f"{prefix}{name}": weight for name, weight in args.items() if name != "x"}
    return layers_of(from_llama2c(rest | given, config))[0]


def recorded_attention(args: Mapping[str, Any], config: Config) -> dict[str, jax.Array]:
    w = recorded_block(args, "layers.0.attention.", config).attn

    def row(x: jax.Array) -> jax.Array:
        (cache,) = empty_cache(config, len(x), x.dtype)
        return attention(w, x, cache, positions(0, len(x), config))[0]

    return {"0": vmap(row)(args["x"])}


def recorded_layer(args: Mapping[str, Any], config: Config) -> dict[str, jax.Array]:
    w = recorded_block(args, "layers.0.", config)

    def row(x: jax.Array) -> jax.Array:
        (cache,) = empty_cache(config, len(x), x.dtype)
        return block(w, x, cache, positions(0, len(x), config), config.eps)[0]

    return {"0": vmap(row)(args["x"])}


@pytest.mark.parametrize("what", ["value", "gradient"])
@pytest.mark.parametrize(("name", "function"), [("attention", recorded_attention), ("block", recorded_layer)])
def test_parity(recording: Recording, name: str, function: Callable[..., Any], what: str) -> None:
    recording.check(name, function, what)


@partial(jit, static_argnames="config")
def batch_logits(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    return vmap(partial(logits, params, config=config))(tokens)


def test_logits_parity(recording: Recording) -> None:
    config, arrays = recording.config, recording.arrays
    params, seq = from_llama2c(recording.under("param."), config), arrays["tokens"].shape[1]
    to_the_end = np.pad(arrays["tokens"], ((0, 0), (0, config.ctx - seq)))
    answers = batch_logits(params, to_the_end, config)
    assert_close(answers[:, :seq], arrays["logits"], 1e-5)
    # The greedy continuation of 4 tokens, up to where the context is full and llama2.c starts to truncate it.
    greedy = arrays["greedy"]
    chosen = batch_logits(params, greedy[:, : config.ctx], config).argmax(axis=-1)
    assert (chosen[:, 3:] == greedy[:, 4 : config.ctx + 1]).all()


# ---- Derivatives -----------------------------------------------------------------------------------------------------


def bare_attention(w: Attention, x: jax.Array, angles: jax.Array) -> jax.Array:
    where = positions(0, len(x), SMALL)._replace(angles=angles)
    return attention(w, x, empty_cache(SMALL, len(x), x.dtype)[0], where)[0]


def bare_block(w: Block, x: jax.Array, angles: jax.Array) -> jax.Array:
    where = positions(0, len(x), SMALL)._replace(angles=angles)
    return block(w, x, empty_cache(SMALL, len(x), x.dtype)[0], where, SMALL.eps)[0]


@pytest.mark.parametrize(("function", "part"), [(bare_attention, "attn"), (bare_block, None)])
def test_gradient_matches_finite_differences(function: Callable[..., Any], part: str | None, x64: None) -> None:
    w: Any = shapes(SMALL).blocks[0]
    sizes = (getattr(w, part) if part else w, *(jax.ShapeDtypeStruct((5, n), float) for n in (SMALL.dim, 5)))
    rng, f = np.random.default_rng(0), jax.jit(function)
    drawn = jax.tree.map(lambda a: jnp.array(rng.standard_normal(a.shape) / 2), sizes)
    assert_finite(f(*drawn))  # check_grads would accept NaN on both sides
    check_grads(f, drawn, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


# ---- Doors -----------------------------------------------------------------------------------------------------------


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "an id beyond the vocabulary": ([3, SMALL.vocab], "ids from 0 to 28"),
    "a negative id": ([3, -1], "ids from 0 to 28"),
    "none": ([], "got 0 tokens"),
    "more than the context holds": ([1] * (SMALL.ctx + 1), "got 132 tokens, expected 1 to 131"),
    "two sequences": ([[1, 2], [3, 4]], "2 axes"),
    "floats": ([1.0, 2.0], "float64"),
    "a number": (3, "0 axes"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens_are_refused_outside_jit(name: str, no_type_checks: None) -> None:
    """Inside, out-of-range ids would give numbers, and the others errors that tell nothing."""
    tokens, says = BAD_TOKENS[name]
    for call in (
        lambda: logits(PARAMS, tokens, SMALL),
        lambda: llama(PARAMS, tokens, empty_cache(SMALL, 200, jnp.float32), 0, SMALL),
    ):
        with pytest.raises(LlamaError, match=says) as caught:
            call()
        assert caught.value.field == "tokens"


def test_a_cache_without_room_is_refused_outside_jit() -> None:
    """Written past its end, keys would replace earlier ones."""
    cache = empty_cache(SMALL, 9, jnp.float32)
    with pytest.raises(LlamaError, match="got 9 positions, expected at least 10") as caught:
        llama(PARAMS, TOKENS, cache, 3, SMALL)
    assert caught.value.field == "cache"


def test_tokens_may_be_a_list(no_type_checks: None) -> None:
    assert_close(logits(PARAMS, TOKENS.tolist(), SMALL), whole(PARAMS, TOKENS, SMALL), 1e-5)


# ---- Properties of a small model with random parameters --------------------------------------------------------------


def used_cache(config: Config, ctx: int = len(TOKENS) + 4, dtype: Any = jnp.float32) -> tuple[Cache, ...]:
    """A cache of random numbers: the contents of unfilled positions must not matter."""
    rng = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: jnp.array(9 * rng.standard_normal(leaf.shape), dtype), empty_cache(config, ctx, dtype)
    )


def test_start_may_be_an_int_or_an_array() -> None:
    cache = used_cache(SMALL)
    for start in (0, 4):
        fixed = jit(llama, static_argnames=("start", "config"))(PARAMS, TOKENS, cache, start, SMALL)
        assert_close(fixed, run(PARAMS, TOKENS, cache, start, SMALL), 1e-6, f"start {start}")


def test_jit_matches_eager() -> None:
    config, params = replace(SMALL, layers=1), PARAMS._replace(blocks=layers_of(PARAMS)[:1])
    compiled = jax.jit(logits, static_argnames="config")
    assert_close(compiled(params, TOKENS, config), logits(params, TOKENS, config), 1e-5)


def test_vmap_matches_a_loop() -> None:
    rows = jnp.stack([TOKENS, TOKENS[::-1], (TOKENS * 7) % SMALL.vocab])
    together = jit(vmap(partial(logits, PARAMS, config=SMALL)))(rows)
    assert_close(together, jnp.stack([whole(PARAMS, row, SMALL) for row in rows]), 1e-5)


def test_bfloat16_matches_float64_within_rounding(x64: None) -> None:
    params = random_params(SMALL, dtype=jnp.bfloat16)
    exact = whole(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), TOKENS, SMALL)
    rounded = whole(params, TOKENS, SMALL)
    assert rounded.dtype == jnp.bfloat16
    assert_close(rounded, exact, 0.03)
    single = whole(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), TOKENS, SMALL)
    assert single.dtype == jnp.float32
    assert_close(single, exact, 5e-6)


OTHERS = {
    "theta": replace(SMALL, theta=1.5 * SMALL.theta),
    "eps": replace(SMALL, eps=3 * SMALL.eps),
    "no scaling": replace(SMALL, rope_scaling=None),
    "linear": replace(SMALL, rope_scaling=RopeScaling("linear", 3.0)),
    "factor": replace(SMALL, rope_scaling=RopeScaling("llama3", 4.0, 40, low=1.0, high=4.0)),
    "original_ctx": replace(SMALL, rope_scaling=RopeScaling("llama3", 3.0, 80, low=1.0, high=4.0)),
    "low": replace(SMALL, rope_scaling=RopeScaling("llama3", 3.0, 40, low=2.0, high=4.0)),
    "high": replace(SMALL, rope_scaling=RopeScaling("llama3", 3.0, 40, low=1.0, high=9.0)),
    "yarn": replace(SMALL, rope_scaling=RopeScaling("yarn", 3.0, 40, low=1.0, high=4.0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_config_value_matters(name: str) -> None:
    """At position 500, where even a small change of the frequencies changes the angles."""

    def far(config: Config) -> np.ndarray:
        config = replace(config, layers=1)
        cache = jax.tree.map(lambda leaf: 0.1 * leaf, used_cache(config, 501))
        params = PARAMS._replace(blocks=layers_of(PARAMS)[:1])
        return np.asarray(run(params, TOKENS[:1], cache, 500, config)[0], np.float64)

    change = np.linalg.norm(far(OTHERS[name]) - far(SMALL)) / np.linalg.norm(far(SMALL))
    assert change > 1e-3, f"{change:.1e}"


def test_yarn_sharpens_the_scores() -> None:
    """Others multiply cosines and sines, and so q and k, by a: scores grow by a², as they do with a² on q alone."""
    plain = RopeScaling("yarn", 3.0, 40, low=1.0, high=4.0)
    sharp = plain._replace(attention_factor=1.3)
    sharper_q = PARAMS._replace(
        blocks=tuple(w._replace(attn=w.attn._replace(q=1.3**2 * w.attn.q)) for w in layers_of(PARAMS))
    )
    want = whole(sharper_q, TOKENS, replace(SMALL, rope_scaling=plain))
    assert_close(whole(PARAMS, TOKENS, replace(SMALL, rope_scaling=sharp)), want, 1e-5)


def test_tied_gradient_is_the_sum_of_both_uses() -> None:
    untied = PARAMS._replace(unembed=PARAMS.embed)
    grad = jit(jax.grad(loss), static_argnames="config")
    apart = grad(untied, TOKENS, TOKENS[::-1], SMALL)
    tied = grad(PARAMS._replace(unembed=None), TOKENS, TOKENS[::-1], replace(SMALL, tied=True))
    assert_close(tied, apart._replace(embed=apart.embed + apart.unembed, unembed=None), 1e-5)
