"""The properties hold for our model and transformers', and each check fails for a model that violates it."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from builders import SMALL, cache_name, layers_of, random_params
from jax import numpy as jnp
from jax import vmap
from transformers import LlamaConfig, LlamaForCausalLM

import lovely_llama as ll
from lovely_llama_tools import check_cache, check_causality, check_heads, check_logits, check_rotation, check_rows

TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab, 7)
RAGGED = [TOKENS[:4], TOKENS[1:], TOKENS[:1], TOKENS[3:]]
ROOM = len(TOKENS) + 4

logits = jax.jit(ll.logits, static_argnums=2)
llama = jax.jit(ll.llama, static_argnums=4)


class Ours(NamedTuple):
    """Our model, with the interfaces that the checks expect."""

    params: ll.Params
    dtype: Any = jnp.float32

    def model(self, tokens: Any) -> Any:
        return logits(self.params, jnp.asarray(tokens), SMALL)

    def step(self, tokens: Any, cache: Any) -> tuple[Any, Any]:
        """Decode tokens with a cache that counts its filled positions; the unfilled ones are not zero."""
        seen, cache = cache or (0, jax.tree.map(lambda leaf: leaf + 9, ll.empty_cache(SMALL, ROOM, self.dtype)))
        out, cache = llama(self.params, jnp.asarray(tokens), cache, jnp.array(seen), SMALL)
        return out, (seen + len(tokens), cache)

    def rows(self, tokens: Sequence[Any]) -> list[Any]:
        """Ragged rows in one batch: a prefill of each row's first token, then the rest, padded, from position 1."""
        width = max(map(len, tokens))
        padded = jnp.array([[*row, *[0] * (width - len(row))] for row in tokens])
        caches = vmap(lambda _: ll.empty_cache(SMALL, ROOM, self.dtype))(padded)

        def run(tokens: jax.Array, cache: Any, start: jax.Array) -> Any:
            return ll.llama(self.params, tokens, cache, start, SMALL)

        first, caches = jax.jit(vmap(run))(padded[:, :1], caches, jnp.zeros(len(tokens), int))
        rest = first[:, :0]
        if width > 1:
            rest, _ = jax.jit(vmap(run))(padded[:, 1:], caches, jnp.ones(len(tokens), int))
        together = jnp.concatenate([first, rest], axis=1)
        return [scores[: len(row)] for scores, row in zip(together, tokens, strict=True)]


OURS = Ours(random_params(SMALL))


def rotate(x: Any, position: int) -> Any:
    return ll.rope(jnp.asarray(x), ll.rope_angles(jnp.array(position), SMALL))


def with_heads(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    return logits(params, jnp.asarray(tokens), config)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.float64, 1e-13)])
def test_ours(dtype: Any, bound: float, x64: None) -> None:
    ours = Ours(random_params(SMALL, dtype=dtype), dtype)
    check_causality(ours.model, TOKENS.tolist(), SMALL.vocab)
    check_cache(ours.step, ours.model, TOKENS.tolist(), bound)
    check_rows(ours.rows, ours.model, RAGGED, bound)
    check_heads(with_heads, ours.params, SMALL, TOKENS, bound)


def test_rotation() -> None:
    check_rotation(rotate, SMALL.head_dim, 1e-5)


@torch.no_grad()
def test_transformers() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.set_attn_implementation("eager")
    given = cache_name(theirs)

    def whole(tokens: Any) -> Any:
        return theirs(torch.tensor(tokens)[None]).logits[0]

    def cached(tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = theirs(torch.tensor(tokens)[None], **{given: cache}, use_cache=True)
        return out.logits[0], out[given]

    check_causality(whole, TOKENS, 29)
    check_cache(cached, whole, TOKENS)


# ---- Models that violate them ----------------------------------------------------------------------------------------

causality = partial(check_causality, tokens=TOKENS, vocab=SMALL.vocab)
cache = partial(check_cache, model=OURS.model, tokens=TOKENS, bound=1e-5)
rows = partial(check_rows, model=OURS.model, tokens=RAGGED, bound=1e-5)
rotation = partial(check_rotation, head_dim=SMALL.head_dim, bound=1e-5)
heads = partial(check_heads, params=OURS.params, config=SMALL, tokens=TOKENS, bound=1e-5)


def with_eps(eps: float) -> Ours:
    """Our model with another ε, as somebody's port may have."""
    config = replace(SMALL, eps=eps)

    class Port(Ours):
        def model(self, tokens: Any) -> Any:
            return logits(self.params, jnp.asarray(tokens), config)

        def step(self, tokens: Any, cache: Any) -> tuple[Any, Any]:
            seen, cache = cache or (0, ll.empty_cache(SMALL, ROOM, self.dtype))
            out, cache = llama(self.params, jnp.asarray(tokens), cache, jnp.array(seen), config)
            return out, (seen + len(tokens), cache)

        def rows(self, tokens: Sequence[Any]) -> list[Any]:
            return [self.model(row) for row in tokens]

    return Port(OURS.params)


WRONG_EPS = with_eps(1e-2)


def late(tokens: Any, cache: Any) -> tuple[Any, Any]:
    """A cache written one position too late."""
    scores, (seen, cache) = OURS.step(tokens, cache)
    return scores, (seen + 1, cache)


def crossed(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    """Query heads attend to the keys of the previous group."""
    shift = config.q_per_kv // 4
    blocks = [w._replace(attn=w.attn._replace(k=jnp.roll(w.attn.k, shift, 0))) for w in layers_of(params)]
    return with_heads(params._replace(blocks=tuple(blocks)), config, tokens)


def biased(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    """The first query head of each group, weighted twice."""
    blocks = [w._replace(attn=w.attn._replace(o=w.attn.o.at[:, :, 0].multiply(2))) for w in layers_of(params)]
    return with_heads(params._replace(blocks=tuple(blocks)), config, tokens)


def ordered(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    """The first third of the key/value heads, weighted twice."""
    blocks = [
        w._replace(attn=w.attn._replace(o=w.attn.o.at[:, : len(w.attn.k) // 3].multiply(2))) for w in layers_of(params)
    ]
    return with_heads(params._replace(blocks=tuple(blocks)), config, tokens)


def uneven(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    """Every fourth query head amplified, however they are grouped."""

    def louder(o: Any) -> Any:
        return o.reshape(len(o), -1, config.head_dim).at[:, ::4].multiply(2).reshape(o.shape)

    blocks = [w._replace(attn=w.attn._replace(o=louder(w.attn.o))) for w in layers_of(params)]
    return with_heads(params._replace(blocks=tuple(blocks)), config, tokens)


# Each with the message that it must produce.
BROKEN: dict[str, tuple[Callable[[], None], str]] = {
    "a token sees the next": (lambda: causality(lambda t: OURS.model(t)[::-1]), "logits before a change at 1: "),
    "another eps, by its logits": (lambda: check_logits(WRONG_EPS.model, OURS.model, TOKENS), "logits: got a relative"),
    "another eps, not a cache": (lambda: cache(WRONG_EPS.step), "logits of the whole in one step, before a cache"),
    "another eps, not a batch": (lambda: rows(WRONG_EPS.rows), "the row of 4 in a batch of its own: got a relative"),
    "tokens are ignored": (lambda: causality(lambda t: OURS.model(TOKENS)), "logits at a change at 0: got the same"),
    "cache written late": (lambda: cache(late), "logits at 1 after a prefill of 1: got a relative error"),
    "prefill cut short": (
        lambda: cache(lambda t, c: OURS.step(t[-3:], c) if len(t) < 7 else OURS.step(t, c)), "a prefill of 4: got shape"
    ),
    "rows in another order": (
        lambda: rows(lambda t: OURS.rows(t[::-1]), tokens=[TOKENS, TOKENS[::-1]]), "the row of 7: got a relative"
    ),
    "rows padded on the left": (
        lambda: rows(lambda t: [OURS.model([*[0] * (max(map(len, t)) - len(r)), *r])[-len(r) :] for r in t]),
        "logits of the row of 4: got",
    ),
    "half the angle": (lambda: rotation(lambda x, m: rotate(x, m // 2)), "a product over distance 1 at 1: "),
    "addition in place of rotation": (lambda: rotation(lambda x, m: jnp.asarray(x) + m), "a norm at 77: "),
    "rotation that starts at position 1": (lambda: rotation(lambda x, m: rotate(x, m + 1)), "a vector rotated at 0: "),
    "no rotation": (lambda: rotation(lambda x, m: jnp.asarray(x)), "a product over distance 1: got that over 0"),
    "keys of another group": (lambda: heads(crossed), "keys and values repeated for every query head: "),
    "a query head weighted twice": (lambda: heads(biased), "keys and values repeated for every query head: "),
    "a key/value head weighted twice": (lambda: heads(ordered), "key/value heads in another order: "),
    "amplified query head": (lambda: heads(uneven), "query heads in another order: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_can_fail(name: str) -> None:
    broken, says = BROKEN[name]
    with pytest.raises(AssertionError, match=re.escape(says)):
        broken()


def test_checks_fail_without_assertions_too() -> None:
    """`python -O` leaves out every assert statement."""
    code = "import numpy as np; from lovely_llama_tools import check_causality as check\n"
    code += "check(lambda t: np.eye(9)[t[::-1]], range(5), 9)"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "AssertionError: logits at a change at 0" in done.stderr
