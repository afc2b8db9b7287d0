"""Part 5: the loss, against llama2.c, the formula in float64 and finite differences; the optimiser against torch's."""

import importlib
from dataclasses import replace
from functools import partial
from typing import Any

import curve
import jax
import numpy as np
import pytest
import torch
from asserts import assert_close, jit
from builders import RECORDED, SMALL, Recording, layers_of, load_recording, random_params
from jax import numpy as jnp
from jax.test_util import check_grads

from lovely_llama import (
    Adapter,
    Config,
    LlamaError,
    Params,
    adamw,
    adapt,
    clip,
    cross_entropy,
    init,
    learning_rate,
    logits,
    loss,
    moments,
    shapes,
)
from lovely_llama_tools.fast.layers import stack
from lovely_llama_tools.formats.llama2c import from_llama2c

optax: Any = importlib.import_module("optax")  # which is partly untyped
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


def test_cross_entropy_is_at_least_float32() -> None:
    """Of bfloat16 logits, to float32's accuracy."""
    rng = np.random.default_rng(0)
    scores = jnp.array(4 * rng.standard_normal((*TOKENS.shape, SMALL.vocab)), jnp.bfloat16)
    got = cross_entropy(scores, jnp.array(TARGETS))
    assert got.dtype == jnp.float32
    exact, counts = np.asarray(scores, np.float64), TARGETS >= 0
    chosen = np.take_along_axis(exact, np.maximum(TARGETS, 0)[..., None], -1)[..., 0]
    assert_close(got, (np.logaddexp.reduce(exact, axis=-1) - chosen)[counts].mean(), 1e-6)


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


# ---- The optimiser ---------------------------------------------------------------------------------------------------


LENGTHS = (6, 1, 6)  # of documents, side by side in a row


def packed(seed: int) -> list[jax.Array]:
    """The documents in one row; each one's last target is ignored, and `first` is where it begins."""
    tokens = np.random.default_rng(seed).integers(SMALL.vocab, size=sum(LENGTHS))
    targets, ends = np.roll(tokens, -1), np.cumsum(LENGTHS)
    targets[ends - 1] = -1
    return [jnp.array(row[None], jnp.int32) for row in (tokens, targets, np.repeat(ends - LENGTHS, LENGTHS))]


def test_packed_documents_do_not_see_each_other() -> None:
    """The others' logits keep their bits when one changes, and the loss is that of each document alone."""
    run = jit(lambda tokens, first: logits(PARAMS, tokens, SMALL, first=first))
    (tokens,), (targets,), (first,) = packed(0)
    other = jnp.where(first == 0, (tokens + 1) % SMALL.vocab, tokens)
    before, after = run(tokens, first), run(other, first)
    assert (before == after)[first != 0].all() and (before != after)[first == 0].any(axis=-1).all()
    value_and_grad = jit(jax.value_and_grad(partial(loss, config=SMALL)))
    together = value_and_grad(PARAMS, tokens, targets, first=first)
    begins, solo = np.cumsum(LENGTHS) - LENGTHS, []
    for begin, length in zip(begins, LENGTHS, strict=True):
        own = slice(begin, begin + length)
        solo.append(jax.tree.map(lambda x, n=length: (n - 1) * x, value_and_grad(PARAMS, tokens[own], targets[own])))
    mean = jax.tree.map(lambda *parts: sum(parts) / (sum(LENGTHS) - len(LENGTHS)), *solo)
    assert_close(together, mean, 5e-6)


def test_a_document_that_begins_after_its_token_is_refused() -> None:
    tokens, targets, first = packed(0)
    with pytest.raises(LlamaError) as caught:
        loss(PARAMS, tokens, targets, SMALL, first=first + 1)
    assert caught.value.field == "first"


def drawn(seed: int, like: Any, size: float = 1) -> Any:
    """A tree of normally distributed arrays."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.array(size * rng.standard_normal(leaf.shape), jnp.float32), like)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipping_is_that_of_torch_and_optax(size: float) -> None:
    gradients = drawn(0, PARAMS, size)
    clipped, norm = jit(partial(clip, limit=1.5))(gradients)
    theirs = [torch.nn.Parameter(torch.zeros(leaf.shape)) for leaf in jax.tree.leaves(gradients)]
    for parameter, leaf in zip(theirs, jax.tree.leaves(gradients), strict=True):
        parameter.grad = torch.tensor(np.asarray(leaf))
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.5).numpy(), 1e-6)
    assert_close(jax.tree.leaves(clipped), [parameter.grad for parameter in theirs], 5e-6)  # torch adds 1e-6 to norms
    transform = optax.clip_by_global_norm(1.5)
    assert_close(clipped, transform.update(gradients, transform.init(PARAMS))[0], 1e-6)


def test_no_gradient_is_not_clipped_to_nan() -> None:
    nothing, norm = clip(jax.tree.map(jnp.zeros_like, PARAMS), 1.0)
    assert norm == 0 and not any(leaf.any() for leaf in jax.tree.leaves(nothing))


def test_adamw_is_that_of_torch_and_optax() -> None:
    """Ten steps of different rates, with the decay on everything but the gains of norms."""
    rates = [learning_rate(step, 0.02, 3, 10, 0.001) for step in range(10)]
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(PARAMS)}
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for name, leaf in named.items()}
    norms = [parameter for name, parameter in theirs.items() if name.endswith("norm")]
    others = [parameter for name, parameter in theirs.items() if not name.endswith("norm")]
    assert len(norms) == 5 and len(others) == 16
    groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    mask = jax.tree.map_with_path(lambda path, _: "norm" not in path[-1].name, PARAMS)
    transform = optax.adamw(lambda step: jnp.array(rates)[step], 0.9, 0.95, 1e-8, weight_decay=0.1, mask=mask)
    other, state = PARAMS, transform.init(PARAMS)
    params, remembered, step = PARAMS, moments(PARAMS), jit(partial(adamw, decay=0.1))
    for i, rate in enumerate(rates):
        gradients = drawn(i, PARAMS, 10.0 ** (i % 3 - 4))  # small enough for ε to matter
        params, remembered = step(params, gradients, remembered, np.float32(rate))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, leaf in zip(theirs.values(), jax.tree.leaves(gradients), strict=True):
            parameter.grad = torch.tensor(np.asarray(leaf))
        optimizer.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(gradients, state, other)
        other = optax.apply_updates(other, updates)
    assert remembered.step == 10
    assert_close(jax.tree.leaves(params), [parameter.detach() for parameter in theirs.values()], 1e-6)
    assert_close(params, other, 1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_decay_spares_gains_by_name(stacked: bool) -> None:
    """Stacked, a layer's gains are a matrix; they still do not decay."""
    params = PARAMS._replace(blocks=stack(layers_of(PARAMS))) if stacked else PARAMS
    after, _ = adamw(params, jax.tree.map(jnp.zeros_like, params), moments(params), 0.5, 0.1)
    for (path, new), old in zip(jax.tree.leaves_with_path(after), jax.tree.leaves(params), strict=True):
        assert_close(new, old if "norm" in path[-1].name else 0.95 * old, 1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 3e-4, 100, 1000, 3e-5) for step in (0, 50, 100, 550, 1000, 2000)]
    assert rates == pytest.approx([0, 1.5e-4, 3e-4, 1.65e-4, 3e-5, 3e-5], rel=1e-12)
    schedule = optax.warmup_cosine_decay_schedule(0, 3e-4, 100, 1000, 3e-5)
    for step in range(0, 1200, 7):
        assert learning_rate(step, 3e-4, 100, 1000, 3e-5) == pytest.approx(np.asarray(schedule(step)).item(), rel=1e-5)
    assert learning_rate(0, 1.0, 0, 0, 0.5) == 1


@pytest.mark.parametrize("name", RECORDED)
def test_a_run_of_llama2c_is_reproduced(name: str) -> None:
    """Twenty steps of its model and optimiser: each loss, rate and norm, and how each parameter changes over all.

    Both are in float32. The parameters change by 1 to 10 %: compared with themselves, they would agree untrained to
    that. Rounding is amplified from step to step, more so in the deep models, whose recorded losses are off by 5e-6.
    """
    recording = load_recording(name)
    config, arrays, train = recording.config, recording.arrays, recording.train
    bound, norms, changes = (5e-5, 1e-2, 1e-3) if config.layers > 10 else (1e-5, 2e-5, 1e-4)
    settings = (train["learning_rate"], train["warmup_iters"], train["lr_decay_iters"], train["min_lr"])

    @jax.jit
    def gradients_of(params: Params, batch: Any) -> tuple[jax.Array, Params]:
        def mean(params: Params) -> jax.Array:
            return jax.vmap(lambda ids: loss(params, ids[:, :-1], ids[:, 1:], config))(batch).mean()

        return jax.value_and_grad(mean)(params)

    shrink = jax.jit(partial(clip, limit=train["grad_clip"]))
    update: Any = jax.jit(partial(adamw, decay=train["weight_decay"]))
    first = params = from_llama2c(recording.under("param."), config)
    remembered = moments(params)
    tokens, losses, rates = (arrays[f"train.{name}"] for name in ("tokens", "loss", "lr"))
    for step, (batch, want, rate) in enumerate(zip(tokens, losses, rates, strict=True)):
        assert learning_rate(step, *settings) == rate
        value, gradients = gradients_of(params, batch)
        if not step:  # the first step's gradient was added to one that was still there
            gradients = jax.tree.map(lambda a, b: a + b, gradients, from_llama2c(recording.under("grad."), config))
        gradients, norm = shrink(gradients)
        params, remembered = update(params, gradients, remembered, np.float32(rate))
        assert_close(value, want, bound, f"loss {step}")
        assert_close(norm, arrays["train.grad_norm"][step], norms, f"norm {step}")
    last = from_llama2c(recording.under("train.param."), config)
    got, want = (jax.tree.map(lambda a, b: a - b, end, first) for end in (params, last))
    assert_close(got, want, changes)


def test_the_curve_is_that_of_torch() -> None:
    """Fifty steps of `./dev curve`: transformers' model under torch's AdamW and clipping, on the same batches."""
    params = init(jax.random.key(0), curve.CONFIG)
    left, right = list(curve.ours(params, 50)), list(curve.theirs(params, curve.batches(50), curve.rates(50)))
    assert left[-1] < left[0] - 1
    assert max(abs(a - b) for a, b in zip(left, right, strict=True)) <= curve.BOUND


# ---- Adapters --------------------------------------------------------------------------------------------------------


def loss_with(params: Params, config: Config) -> jax.Array:
    return loss(params, jnp.array(TOKENS), jnp.array(TARGETS), config)


def test_adapters_change_weights_by_a_product() -> None:
    """As `peft` computes it: W + (α/r) B A, with the matrix as [out, in]."""
    w = PARAMS.blocks[0].attn  # pyright: ignore
    q = Adapter(drawn(1, jnp.zeros((4, 14))), drawn(2, jnp.zeros((3, 4, 10, 4))))
    o = Adapter(drawn(3, jnp.zeros((4, 3, 4, 10))), drawn(4, jnp.zeros((14, 4))))
    got = adapt(w, w._replace(q=q, k=None, v=None, o=o), 0.5)
    assert got.k is w.k and got.v is w.v
    a, b = np.asarray(q.a), np.asarray(q.b).reshape(-1, 4)
    assert_close(got.q.reshape(-1, 14), np.asarray(w.q).reshape(-1, 14) + 0.5 * b @ a, 1e-6)
    a, b = np.asarray(o.a).reshape(4, -1), np.asarray(o.b)
    assert_close(got.o.reshape(14, -1), np.asarray(w.o).reshape(14, -1) + 0.5 * b @ a, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_are_trained_alone(tied: bool) -> None:
    """The gradient has their structure, whether the embedding is tied or not; zeros in b change nothing."""
    config = replace(SMALL, tied=tied)
    params, nothing = random_params(config), jax.tree.map(lambda leaf: None, shapes(config))
    q = Adapter(drawn(1, jnp.zeros((2, 14))), jnp.zeros((3, 4, 10, 2)))
    adapters = nothing._replace(blocks=tuple(b._replace(attn=b.attn._replace(q=q)) for b in nothing.blocks))
    objective = jit(jax.value_and_grad(lambda low: loss_with(adapt(params, low, 2.0), config)))
    value, gradient = objective(adapters)
    assert_close(value, loss_with(params, config), 1e-6)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapters)
    assert all(b.attn.q.b.any() and not b.attn.q.a.any() for b in gradient.blocks)
