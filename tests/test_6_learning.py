"""Part 6: the loss, against llama2.c, the formula in float64 and finite differences."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from asserts import assert_close, jit
from builders import SMALL, Recording, random_params
from jax import numpy as jnp
from jax.test_util import check_grads

import lovely_llama
from lovely_llama import LlamaError, Params, logits, loss, shapes
from lovely_llama_tools.formats.llama2c import from_llama2c

PARAMS = random_params(SMALL)
TOKENS = np.array([[3, 28, 0, 17, 3], [9, 21, 11, 5, 5], [1, 2, 3, 4, 5]], np.int32)
TARGETS = np.array([[28, 0, 17, -1, 28], [-1, -1, 5, 5, 9], [0, -1, -1, -1, -1]], np.int32)
loss_of = jit(partial(loss, config=SMALL))


def plain_loss(params: Params, tokens: np.ndarray, targets: np.ndarray) -> np.floating:
    """Cross-entropy, computed from the logits in numpy and float64."""
    surprises = list[float]()
    for row, row_targets in zip(tokens, targets, strict=True):
        scores = np.asarray(jit(partial(logits, config=SMALL))(params, row), np.float64)
        for answer, target in zip(scores, row_targets, strict=True):
            if target != -1:
                surprises.append(np.logaddexp.reduce(answer) - answer[target])
    return np.mean(surprises)


def test_parity(recording: Recording) -> None:
    config, arrays = recording.config, recording.arrays
    params, value_and_grad = from_llama2c(recording.under("param."), config), jax.value_and_grad(loss)
    value, grads = jit(value_and_grad, static_argnums=3)(params, arrays["tokens"], arrays["targets"], config)
    assert_close(value, arrays["loss"][0], 1e-6)
    assert_close(grads, from_llama2c(recording.under("grad."), config), 5e-5)


def test_formula() -> None:
    """The mean is over all targets that are not ignored, not over rows, which have 4, 3 and 1 of them."""
    assert_close(loss_of(PARAMS, TOKENS, TARGETS), plain_loss(PARAMS, TOKENS, TARGETS), 1e-6)


def test_batches_of_any_shape() -> None:
    flat = loss_of(PARAMS, TOKENS, TARGETS)
    assert flat.shape == () and flat.dtype == jnp.float32
    assert_close(loss_of(PARAMS, TOKENS[:, None], TARGETS[:, None]), flat, 1e-6)
    assert_close(loss_of(PARAMS, TOKENS[0], TARGETS[0]), plain_loss(PARAMS, TOKENS[:1], TARGETS[:1]), 1e-6)


def test_ignored_targets_have_no_effect() -> None:
    """Neither on the loss nor on gradients: the last four tokens of the last row are arbitrary."""
    value_and_grad = jit(jax.value_and_grad(partial(loss, config=SMALL)))
    other = TOKENS.copy()
    other[2, 1:] = [28, 27, 26, 25]
    value, grads = value_and_grad(PARAMS, TOKENS, TARGETS)
    other_value, other_grads = value_and_grad(PARAMS, other, TARGETS)
    assert value == other_value
    assert_close(other_grads, grads, 1e-6)
    nothing, no_grads = value_and_grad(PARAMS, TOKENS, np.full_like(TARGETS, -1))
    assert nothing == 0 and not any(grad.any() for grad in jax.tree.leaves(no_grads))


@pytest.mark.parametrize(
    ("tokens", "targets", "field"),
    [
        (TOKENS + 29, TARGETS, "tokens"),
        (TOKENS - 4, TARGETS, "tokens"),
        (TOKENS, TARGETS + 1, "tokens"),  # of the file "targets"
        (TOKENS, TARGETS[:, :4], "targets"),
        (np.ones((2, 200), np.int32), np.ones((2, 200), np.int32), "tokens"),
        (np.ones((2, 0), np.int32), np.ones((2, 0), np.int32), "tokens"),
        (TOKENS.astype(np.float32), TARGETS, "tokens"),
    ],
)
def test_bad_batches_are_refused_outside_jit(tokens: Any, targets: Any, field: str, no_type_checks: None) -> None:
    """An id beyond the vocabulary would be scored as its last."""
    with pytest.raises(LlamaError) as caught:
        loss(PARAMS, tokens, targets, SMALL)
    assert caught.value.field == field


def test_loss_is_at_least_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides use the same bfloat16 logits, since two programs that compute them may round them differently."""
    scores = jnp.array(4 * np.random.default_rng(0).standard_normal((SMALL.vocab, SMALL.vocab)), jnp.bfloat16)
    monkeypatch.setattr(lovely_llama, "logits", lambda params, tokens, config: scores[tokens])
    got = loss(PARAMS, jnp.array(TOKENS), jnp.array(TARGETS), SMALL)
    assert got.dtype == jnp.float32
    wide, counts = np.asarray(scores, np.float64)[TOKENS], TARGETS >= 0
    surprises = np.logaddexp.reduce(wide, axis=-1) - np.take_along_axis(wide, TARGETS[..., None], -1)[..., 0]
    assert_close(got, surprises[counts].mean(), 1e-6)


def test_memory_is_linear_in_seq() -> None:
    """According to the compiler. When all attention scores were stored, twice the seq took 3.7 times the memory."""

    def temporary(seq: int) -> int:
        tokens = jax.ShapeDtypeStruct((seq,), jnp.int32)
        lowered = jax.jit(jax.grad(partial(loss, config=SMALL))).lower(shapes(SMALL), tokens, tokens)
        analysis = lowered.compile().memory_analysis()
        assert analysis
        return analysis.temp_size_in_bytes

    assert temporary(4096) < 2.1 * temporary(2048)


def test_loss_with_large_logits() -> None:
    """With logits in the thousands, no exponential overflows and all gradients are finite."""
    loud = PARAMS._replace(norm=1e4 * PARAMS.norm)
    value, grads = jit(jax.value_and_grad(partial(loss, config=SMALL)))(loud, TOKENS, TARGETS)
    assert_close(value, plain_loss(loud, TOKENS, TARGETS), 1e-6)
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))


def test_gradient_matches_finite_differences(x64: None) -> None:
    """Reverse mode against central differences, along a random direction in all parameters at once."""
    params = random_params(SMALL, dtype=jnp.float64)
    loss_at = jax.jit(lambda params: loss(params, jnp.array(TOKENS), jnp.array(TARGETS), SMALL))
    check_grads(loss_at, (params,), order=1, modes=["rev"], eps=1e-6, rtol=1e-7, atol=1e-9)
