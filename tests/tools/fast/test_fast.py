"""The fast forms of the library's functions, against the library: values and gradients, and how they use memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from asserts import assert_close, jit
from builders import SMALL, layers_of, random_params
from jax import numpy as jnp
from jax import vmap

import lovely_llama as ll
from lovely_llama_tools import fast
from lovely_llama_tools.fast import attention as blockwise
from lovely_llama_tools.fast.layers import KEEP, in_tuple, stack, stacked_shapes

SIZE = 64  # keys of a block, so that short prompts span several

# ---- The model: configs × ways × dtypes, pairwise --------------------------------------------------------------------

CONFIGS = {
    "grouped, llama3": SMALL,
    "tied, yarn": replace(
        SMALL, kv_heads=1, q_per_kv=5, layers=3, tied=True, rope_scaling=ll.RopeScaling("yarn", 3.0, 40, 1.0, 4.0, 1.2)
    ),
    "ungrouped, unscaled": replace(SMALL, kv_heads=6, q_per_kv=1, layers=1, rope_scaling=None),
}
WAYS = ("plain", "jit", "stacked", "ragged", "packed")
SEQ, ROWS = 129, 2  # three blocks, the last with a single key


class Batch(NamedTuple):
    """Rows of tokens and of targets, and for each token where its document begins."""

    tokens: jax.Array
    targets: jax.Array
    first: jax.Array


def batch(way: str, config: ll.Config) -> Batch:
    """Two rows: of one document each, or in the way "packed" of three; in the way "ragged" one has fewer targets."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(config.vocab, size=(2, ROWS, SEQ), dtype=np.int32)
    targets[rng.random(targets.shape) < 0.2] = -1
    first = np.zeros_like(tokens)
    if way == "packed":
        first[:, 10:70], first[:, 70:] = 10, 70
    if way == "ragged":
        targets[1, 75:] = -1
    return Batch(*map(jnp.array, (tokens, targets, first)))


def compute_in(model: Any, way: str, params: ll.Params, config: ll.Config, **options: Any) -> dict[str, Any]:
    """Logits, the loss and its gradient, as one of the two modules `model` computes them in a way."""
    rows = batch(way, config)
    compiled = (lambda f: f) if way == "plain" else jit
    first = rows.first if way == "packed" else 0

    def objective(params: ll.Params, rows: Batch) -> jax.Array:
        return model.loss(params, rows.tokens, rows.targets, config, rows.first if way == "packed" else 0, **options)

    loss, gradient = compiled(jax.value_and_grad(objective))(params, rows)
    if way == "ragged":  # each row goes on from a position of its own, in a cache that holds what came before
        caches = vmap(lambda _: ll.empty_cache(config, SEQ, params.embed.dtype))(jnp.arange(ROWS))

        def row(tokens: jax.Array, cache: Any, start: jax.Array) -> Any:
            return model.llama(params, tokens, cache, start, config, **options)

        run = compiled(vmap(row))
        _, caches = run(rows.tokens[:, :80], caches, jnp.array([0, 0]))
        logits, caches = run(rows.tokens[:, 80:], caches, jnp.array([80, 40]))
        return {"logits": logits, "cache": caches, "loss": loss, "gradient": gradient}

    def row_logits(tokens: jax.Array, first: jax.Array) -> jax.Array:
        return model.logits(params, tokens, config, first if way == "packed" else 0, **options)

    logits = compiled(vmap(row_logits))(rows.tokens, jnp.broadcast_to(first, rows.tokens.shape))
    return {"logits": logits, "loss": loss, "gradient": gradient}


def compute(model: Any, way: str, params: ll.Params, config: ll.Config) -> dict[str, Any]:
    """The same, of layers that are stacked where `fast` takes them so; gradients have them in a tuple."""
    stacks = model is fast and way == "stacked"
    given = params._replace(blocks=stack(params.blocks)) if stacks else params
    found = compute_in(model, way, given, config, **({"size": SIZE} if model is fast else {}))
    return {**found, "gradient": in_tuple(found["gradient"])}


def library(name: str, way: str, dtype: Any, *, wide: bool = False) -> dict[str, Any]:
    """What the library computes, which is the same in several ways; and from the same parameters in float32."""
    return computed_once(name, way if way in ("ragged", "packed") else "jit", dtype, wide)


@cache
def computed_once(name: str, way: str, dtype: Any, wide: bool) -> dict[str, Any]:
    params = random_params(CONFIGS[name], dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params) if wide else params
    return compute(ll, way, params, CONFIGS[name])


CASES = [
    pytest.param(name, way, jnp.bfloat16 if (i + j) % 2 else jnp.float32, id=f"{name}-{way}-{(i + j) % 2 * 16 or 32}")
    for (i, name), (j, way) in product(enumerate(CONFIGS), enumerate(WAYS))
]


def errors(got: Any, want: Any) -> dict[str, float]:
    """‖got − want‖ / ‖want‖ of each leaf; and of each kind of result their root mean square, and the worst.

    The loss is left out: it is a mean over tokens, whose rounding errors may cancel by luck."""

    def error(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    found = dict[str, float]()
    for kind in got.keys() - {"loss"}:
        leaves = jax.tree.leaves_with_path(jax.tree.map(error, got[kind], want[kind]))
        values = [value for _, value in leaves]
        found |= {f"{kind}{jax.tree_util.keystr(path)}": value for path, value in leaves}
        found |= {kind: float(np.sqrt(np.mean(np.square(values)))), f"{kind}, the worst": max(values)}
    return found


@pytest.mark.parametrize(("name", "way", "dtype"), CASES)
def test_fast_is_the_library(name: str, way: str, dtype: Any) -> None:
    """In float32 leaf by leaf; in bfloat16 as near to the library in float32 as the library itself is, or almost."""
    config = CONFIGS[name]
    got, want = compute(fast, way, random_params(config, dtype=dtype), config), library(name, way, dtype)
    if dtype == jnp.float32:
        for what, bound in {"logits": 1e-5, "cache": 1e-5, "loss": 1e-6, "gradient": 2e-5}.items():
            assert_close(got.get(what), want.get(what), bound, what)
        return
    exact = library(name, way, dtype, wide=True)
    ours, theirs = errors(got, exact), errors(want, exact)
    for kind in got.keys() - {"loss"}:  # single leaves scatter more than all together
        assert ours[kind] <= 1.5 * theirs[kind], f"{kind}: {ours[kind]:.1e}, the library's own {theirs[kind]:.1e}"
        worst = 2 * theirs[f"{kind}, the worst"]
        wrong = {what: error for what, error in ours.items() if what.startswith(kind) and not error <= worst}
        assert not wrong, f"got errors above {worst:.1e}: {wrong}"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_changes_no_result(dtype: Any) -> None:
    """Master weights in float32, arithmetic in `dtype`. Gradients have the dtype of the parameters."""
    params, rows = random_params(SMALL), batch("plain", SMALL)
    results = [
        jit(jax.value_and_grad(partial(fast.loss, config=SMALL, keep=keep, dtype=dtype)))(params, *rows[:2])
        for keep in KEEP
    ]
    assert_close(results[0], results[1], 1e-5 if dtype == jnp.float32 else 5e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype(np.float32)}
    exact = jit(partial(ll.loss, config=SMALL))(params, *rows[:2])
    assert_close(results[0][0], exact, 1e-6 if dtype == jnp.float32 else 1e-2)
    assert (abs(results[0][0] - exact) < 1e-6 * exact) == (dtype == jnp.float32)


# ---- Attention -------------------------------------------------------------------------------------------------------


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(math.prod(sum(shapes, ())))
    return [jnp.array(rng.standard_normal(shape), jnp.float32) for shape in shapes]


SPANS = [(0, 0), (0, 63), (0, 64), (0, 149), (1, 90), (37, 90), (74, 90), (90, 90), (128, 149)]  # first, last


@pytest.mark.parametrize(("first", "last"), SPANS)
def test_attend_is_the_librarys(first: int, last: int) -> None:
    """Value and gradient: with blocks before the first key, or beyond the last, that hold nothing to see."""
    q, keys, values, cotangent = draw((6,), (150, 6), (150, 6), (6,))

    def with_gradient(attend: Callable[..., jax.Array]) -> Any:
        @jit
        def run(last: jax.Array, first: jax.Array, *args: jax.Array) -> Any:
            out, pull = jax.vjp(partial(attend, last=last, first=first), *args)
            return out, pull(cotangent)

        return run(last, first, q, keys, values)

    value, gradient = with_gradient(ll.attend)
    for size in (37, 64, 256):
        got, by_args = with_gradient(partial(blockwise.attend, size=size))
        assert_close(got, value, 1e-5, f"{size} keys at a time")
        if first < last:
            assert_close(by_args, gradient, 2e-5, f"gradient, {size} keys at a time")
        else:  # one key has the weight 1, whatever it is
            assert_close(by_args[2], gradient[2], 1e-5)
            assert max(abs(leaf).max() for leaf in by_args[:2]) < 1e-6


@pytest.mark.parametrize("last", [0, 62, 63, 64, 149])
def test_blocks_that_are_not_filled_are_not_read(last: int) -> None:
    """With `filled` as an int or an array: NaN from the next block on changes nothing."""
    q, keys, values = draw((6,), (150, 6), (150, 6))
    want = ll.attend(q, keys, values, last)
    beyond = min((last // 64 + 1) * 64, 150)
    k, v = (rows.at[beyond:].set(jnp.nan) if beyond <= 128 else rows for rows in (keys, values))

    def attend(filled: Any) -> jax.Array:
        return blockwise.attend(q, k, v, last, filled=filled, size=64)

    assert_close(attend(last + 1), want, 1e-5)
    assert_close(jit(attend)(last + 1), want, 1e-5)
    assert beyond > 128 or jnp.isnan(blockwise.attend(q, k, v, last, size=64)).all()  # which reads them all


def test_a_single_token_reads_half_a_block_at_a_time() -> None:
    """At position 3 a block of 8 keys would read up to position 7; one of 4 stops at position 3."""
    params, cache = random_params(SMALL), ll.empty_cache(SMALL, 11, jnp.float32)
    nothing = jax.tree.map(lambda leaf: leaf.at[:, 4:].set(jnp.nan), cache)
    run: Any = jit(partial(fast.llama, config=SMALL, size=8))
    assert jnp.isfinite(run(params, jnp.array([5]), nothing, 3)[0]).all()
    assert jnp.isnan(run(params, jnp.array([5, 6]), nothing, 2)[0]).any()


def loops(jaxpr: Any) -> list[Any]:
    """The conditions' types of all `while` loops in a program, whatever stands inside what."""
    found = list[Any]()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            found.append(equation.params["cond_jaxpr"].out_avals[0].shape)
        for inner in jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            found += loops(inner) if hasattr(inner, "eqns") else []
    return found


def test_the_bound_of_the_loop_is_not_batched() -> None:
    """Heads and tokens share it: a condition of one boolean for each of them would compute and discard steps."""
    params = random_params(SMALL)
    where = jax.make_jaxpr(lambda start: fast.llama(params, jnp.array([1, 2, 3]), cache, start, SMALL)[0])
    cache = ll.empty_cache(SMALL, 11, jnp.float32)
    found = loops(where(jnp.array(3)).jaxpr)
    assert found == [()] * SMALL.layers
    static = jax.make_jaxpr(lambda tokens: fast.llama(params, tokens, cache, 3, SMALL)[0])(jnp.array([1, 2, 3]))
    assert loops(static.jaxpr) == []  # a scan, which can be differentiated


# ---- Memory, as the compiler sees it ---------------------------------------------------------------------------------


def temporary(objective: Callable[..., Any], params: Any, seq: int) -> int:
    """Bytes of temporaries of a gradient."""
    tokens = jax.ShapeDtypeStruct((seq,), jnp.int32)
    analysis = jax.jit(jax.grad(objective)).lower(params, tokens, tokens).compile().memory_analysis()
    assert analysis
    return analysis.temp_size_in_bytes


def test_memory_is_linear_in_seq() -> None:
    """The library's takes four times as much for twice the seq."""
    ours, plain = (partial(model.loss, config=replace(SMALL, ctx=4096)) for model in (fast, ll))
    params = ll.shapes(SMALL)
    assert temporary(ours, params, 4096) < 2.1 * temporary(ours, params, 2048)
    assert temporary(plain, params, 2048) > 3 * temporary(plain, params, 1024)


def test_keeping_nothing_takes_less_memory() -> None:
    """Of a layer, its input alone: seq × dim numbers, where its seven products have 12 times as many.

    Layers are stacked, as those of deep models are. In a tuple, XLA may find on a CPU that it computes things twice.
    """
    config = ll.Config(29, 64, 8, 1, 2, 32, 256, 256, 1e-5, 1e4, None, True)
    dots, nothing = (
        temporary(partial(fast.loss, config=config, keep=keep), stacked_shapes(config), 256) for keep in KEEP
    )
    assert dots - nothing > 8 * 256 * 4 * 600


# ---- Micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ragged", "packed"])
def test_micro_batches_equal_the_whole_batch(way: str) -> None:
    """Rows have different numbers of targets, so that the mean of the rows' means would be another number."""
    params, (tokens, targets, first) = random_params(SMALL), batch(way, SMALL)
    if way == "ragged":
        objective, rows = partial(ll.loss, config=SMALL), (tokens, targets)
    else:
        objective, rows = lambda p, x, y, first: ll.loss(p, x, y, SMALL, first), (tokens, targets, first)
    whole = jit(jax.value_and_grad(objective))(params, *rows)
    in_parts = jit(partial(fast.accumulate, objective))
    assert_close(in_parts(params, *(ids[:, None] for ids in rows)), whole, 1e-5)
    ignored = (tokens, jnp.full_like(targets, -1), *rows[2:])
    nothing = in_parts(params, *(ids[:, None] for ids in ignored))
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


# ---- Layers ----------------------------------------------------------------------------------------------------------


def test_stacking_is_undone() -> None:
    params = random_params(SMALL)
    again = in_tuple(params._replace(blocks=stack(layers_of(params))))
    assert_close(again, params, 0)
    assert in_tuple(params) is params


def test_a_stacked_cache_comes_back_stacked() -> None:
    params, tokens, cache = random_params(SMALL), jnp.array([3, 28, 0, 17]), ll.empty_cache(SMALL, 9, jnp.float32)
    run = jit(partial(fast.llama, config=SMALL))
    logits, filled = run(params, tokens, cache, 2)
    stacked = run(params._replace(blocks=stack(params.blocks)), tokens, stack(cache), 2)
    assert_close(stacked, (logits, stack(filled)), 1e-5)
