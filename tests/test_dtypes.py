"""Parts 5 and 6 in every dtype: arithmetic in float32 or wider, results cast back; float64 is the yardstick."""

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from asserts import assert_close, jit
from builders import SMALL, random_params
from jax import numpy as jnp

import lovely_llama as ll
from lovely_llama_tools import fast
from lovely_llama_tools.fast import samplers

DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64)
RNG = np.random.default_rng(0)
SEEN = jnp.arange(29) % 3 == 0
TREE = {"norm": 1 + 0.1 * RNG.standard_normal(7), "w": RNG.standard_normal((5, 7))}
GRADIENTS = jax.tree.map(lambda leaf: 1e-4 * RNG.standard_normal(leaf.shape), TREE)
LARGE = jax.tree.map(lambda leaf: 6e4 * leaf / abs(leaf).max(), TREE)
LOW = ll.Adapter._make((RNG.standard_normal((4, 7)), RNG.standard_normal((5, 4))))
LOGITS, TARGETS = 4 * RNG.standard_normal((3, 29)), np.array([28, -1, 5], np.int32)
SAMPLING = ll.Sampling(1.3, 0.7, 20, 0.95, 0.01)


def wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def adamw(params: Any, gradients: Any) -> Any:
    """The parameters after a step, and the moments after a hundred."""

    def step(_: Any, state: ll.Moments) -> ll.Moments:
        return ll.adamw(params, gradients, state, 1e-2, 0.1, (0.9, 0.999))[1]

    once, first = ll.adamw(params, gradients, ll.moments(params), 1e-2, 0.1, (0.9, 0.999))
    last = jax.lax.fori_loop(1, 100, step, first)
    return once, last.first, last.second


# What is computed, and from which numbers. Results other than logits are compared as they are; logits as probabilities.
LEARNING: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "cross_entropy": (lambda x: ll.cross_entropy(x, TARGETS), (LOGITS,)),
    "loss": (lambda params: ll.loss(params, abs(TARGETS), TARGETS, SMALL), (random_params(SMALL),)),
    "clip": (lambda gradients: ll.clip(gradients, 1e-3), (LARGE,)),
    "moments": (lambda params: ll.moments(params)[1:], (TREE,)),
    "adamw": (adamw, (TREE, GRADIENTS)),
    "adapt": (lambda w, low: ll.adapt(w, {"norm": None, "w": low}, 0.125), (TREE, LOW)),
}
CHOOSING: dict[str, Callable[..., Any]] = {
    "repetition_penalty": lambda x: ll.repetition_penalty(x, SEEN, 1.3),
    "temperature": lambda x: ll.temperature(x, 0.7),
    "greedy": ll.greedy,
    "top_k": lambda x: ll.top_k(x, 7),
    "top_p": lambda x: ll.top_p(x, 0.9),
    "min_p": lambda x: ll.min_p(x, 0.01),
    "Sampling": lambda x: SAMPLING(x, SEEN),
    "fast.top_k": lambda x: samplers.top_k(x, 7),
    "fast.top_p": lambda x: samplers.top_p(x, 0.9),
}
DRAWING: dict[str, Callable[..., Any]] = {
    "categorical": lambda rng, x: ll.categorical(rng, x),
    "choose": lambda rng, x: ll.choose(rng, jnp.array(3), x, x > 1, ll.Sampling(1.0, 1.0, len(x), 1.0, 0.0))[0],
    "fast.choose": lambda rng, x: fast.choose(rng, jnp.array(3), x, x > 1, ll.Sampling(1.0, 1.0, len(x), 1.0, 0.0))[0],
}


def test_every_function_of_the_two_parts_is_here() -> None:
    """`learning_rate` computes with Python's floats."""
    source = Path(ll.__file__).read_text()
    begin, end = (source[: source.index(f"# ---- {part}. ")].count("\n") for part in (5, 7))
    public = {
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and begin < node.lineno < end and node.name in ll.__all__
    }
    tried = {name for name in (*LEARNING, *CHOOSING, *DRAWING) if not name.startswith("fast.")}
    assert public - {"learning_rate"} == tried - {"Sampling"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LEARNING)
def test_learning(name: str, dtype: Any, x64: None) -> None:
    """Of numbers that the dtype has, the result differs from float64's by its last rounding."""
    function, given = LEARNING[name]
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), given)
    run = jit(function)
    got, want = run(*given), run(*jax.tree.map(lambda leaf: leaf.astype(jnp.float64), given))
    assert jax.tree.leaves(got)[0].dtype == (dtype if name in ("clip", "adamw", "adapt") else wide(dtype))
    noise = float(jnp.finfo(dtype).eps)
    assert_close(got, want, 10 * noise if name == "loss" else max(noise, 2e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHOOSING)
def test_choosing(name: str, dtype: Any, x64: None) -> None:
    """The same tokens remain, with the same probabilities."""
    x = jnp.asarray(LOGITS[0], dtype)
    run = jit(CHOOSING[name])
    got, want = run(x), run(x.astype(jnp.float64))
    assert got.dtype == (wide(dtype) if name == "Sampling" else dtype)
    np.testing.assert_array_equal(np.isfinite(np.asarray(got, float)), np.isfinite(np.asarray(want)))
    remain = np.isfinite(np.asarray(want))
    assert_close(np.asarray(got, float)[remain], np.asarray(want)[remain], max(float(jnp.finfo(dtype).eps), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DRAWING)
def test_each_of_1000_equal_tokens_is_drawn(name: str, dtype: Any, x64: None) -> None:
    """Of which 8,000 draws leave out 0.3 on average; 8 bits of a uniform number would reach 256."""
    draw = jit(jax.vmap(partial(DRAWING[name], x=jnp.zeros(1000, dtype))))
    assert len({*np.asarray(draw(jax.random.split(jax.random.key(0), 8000))).tolist()}) > 990


@pytest.mark.parametrize("dtype", DTYPES)
def test_512_micro_batches_sum_to_the_whole(dtype: Any, x64: None) -> None:
    """The gradient of each is the same; in bfloat16, a sum stops at 256 times what is added."""
    params, rows = {"w": jnp.asarray(TREE["w"], dtype)}, jnp.ones((512, 1, 2), jnp.int32)

    def objective(params: Any, tokens: Any, targets: Any) -> Any:
        return (params["w"] * (tokens[0, 0] * targets[0, 0]).astype(dtype)).sum()

    value, gradients = jit(partial(fast.accumulate, objective))(params, rows, rows)
    assert gradients["w"].dtype == dtype and value.dtype == dtype
    assert_close((value, gradients), (params["w"].astype(float).sum(), {"w": np.ones((5, 7))}), 1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e38])
def test_clipping_where_squares_overflow(size: float) -> None:
    gradients = jax.tree.map(lambda leaf: jnp.asarray(size * leaf / 3, jnp.float32), TREE)
    clipped, norm = ll.clip(gradients, size / 100)
    exact = size / 3 * np.linalg.norm(np.concatenate([leaf.ravel() for leaf in TREE.values()]))
    assert_close(norm, np.float64(exact), 1e-6)
    assert_close(clipped, jax.tree.map(lambda leaf: leaf * (size / 3) * (size / 100 / exact), TREE), 1e-6)
