"""float64 as the yardstick: what the README says of float32 and bfloat16, and derivatives by finite differences."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numerics
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_close, assert_finite
from jax import numpy as jnp
from jax.test_util import check_grads

import lovely_llama as ll

FIGURE = re.compile(r"\d\.\de[+-]\d\d")
Columns = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors() -> Iterator[Columns]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are faster so where others want the cores too
    yield numerics.errors()
    torch.set_num_threads(threads)


def test_readme_is_up_to_date(errors: Columns) -> None:
    """The README's table has these rows, columns and words, and its figures are within a factor of 2.

    On one machine they are the same each time. Another's sums are in another order, and its bfloat16 may be rounded
    at other places, but a norm over thousands of roundings hardly moves: for more than 2 the arithmetic has to change.
    """
    _, written, _ = numerics.split(numerics.README.read_text())
    made = numerics.table(errors)
    assert FIGURE.sub("#", written) == FIGURE.sub("#", made), "README.md is stale: run ./dev numerics --write"
    for then, now in zip(written.splitlines(), made.splitlines(), strict=True):
        for a, b in zip(FIGURE.findall(then), FIGURE.findall(now), strict=True):
            assert 1 / 2 <= float(a) / float(b) <= 2, f"README.md is stale: got {now}, written is {then}"


@pytest.mark.parametrize("row", [*numerics.FUNCTIONS, *numerics.DEPTHS])
def test_float32_is_close(row: str, errors: Columns) -> None:
    """A few roundings of 2⁻²⁴ = 6e-8, and in what turns pairs those of angles of up to 300 radians."""
    assert errors["float32"][row] < (3e-6 if row in numerics.DEPTHS else 1.5e-6)


@pytest.mark.parametrize("row", ["rms_norm", "rope", "softmax", "attend", "silu"])
def test_bfloat16_is_rounded_once(row: str, errors: Columns) -> None:
    """What is float32 inside is off by the rounding of its result alone: at most 2⁻⁸, and half of it on average."""
    assert errors["bfloat16"][row] < 2**-9


def test_the_yardstick(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 stays float64, to its last digits: transformers agrees, once what it does in float32 is float64 too."""
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    given = numerics.widen(numerics.draw("float32"))
    ours, theirs = numerics.ours(given), numerics.theirs(given, torch.float64)
    assert {str(result.dtype) for result in ours.values()} == {"float64"}
    assert ours.keys() - theirs.keys() == {"softmax"}
    assert_close({row: ours[row] for row in theirs}, theirs, 1e-13)
    exact = np.exp(np.asarray(given.scores, np.longdouble))
    assert_close(ours["softmax"], exact / exact.sum(axis=1, keepdims=True), 1e-15, "softmax")


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float64)


def attention(w: ll.Attention, x: jax.Array, angles: jax.Array) -> Any:
    return ll.attention(w, x, angles, ll.empty_cache(SMALL, len(x), x.dtype)[0], 0, SMALL)


def block(w: ll.Block, x: jax.Array, angles: jax.Array) -> Any:
    return ll.block(w, x, angles, ll.empty_cache(SMALL, len(x), x.dtype)[0], 0, SMALL)


WEIGHTS: Any = ll.shapes(SMALL).blocks[0]
LONG, FAR = ll.BLOCK + 30, np.array([-1e3, -1e2, -1, 0, 1, 1e2, 1e3])
GRADIENTS: dict[str, tuple[Callable[..., Any], Any]] = {
    "rms_norm": (partial(ll.rms_norm, eps=SMALL.eps), (array(7), array(7))),
    "rope": (ll.rope, (array(10), array(5))),
    "softmax": (lambda x: ll.softmax(x + 1000), (array(7),)),  # whose exponentials have no float64
    "attend": (partial(ll.attend, position=LONG - 9), (array(6), array(LONG, 6), array(LONG, 6))),
    "silu": (lambda x: ll.silu(x + FAR), (array(7),)),
    "swiglu": (ll.swiglu, (array(5), array(7, 5), array(7, 5), array(5, 7))),
    "attention": (attention, (WEIGHTS.attn, array(5, SMALL.dim), array(5, SMALL.head_dim // 2))),
    "block": (block, (WEIGHTS, array(5, SMALL.dim), array(5, SMALL.head_dim // 2))),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name: str, x64: None) -> None:
    """The derivative by every argument is that of finite differences."""
    function, arguments = GRADIENTS[name]
    f, rng = jax.jit(function), np.random.default_rng(0)
    drawn = jax.tree.map(lambda a: jnp.array(rng.standard_normal(a.shape) / 2), arguments)
    assert_finite(f(*drawn))  # or finite differences would be NaN, and equal to any other NaN
    check_grads(f, drawn, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)
