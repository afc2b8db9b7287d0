"""Part 12, properties: each holds for our model and for transformers', and is seen to fail where it does not hold."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import torch
from conftest import SMALL, random_params
from jax import numpy as jnp
from jax import vmap
from transformers import LlamaConfig, LlamaForCausalLM

import lovely_llama as ll

PARAMS = random_params(SMALL)
TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab, 6)
BOUND = 1e-5


logits = jax.jit(ll.logits, static_argnums=2)
llama = jax.jit(ll.llama, static_argnums=4)


def model(tokens: Any) -> Any:
    return logits(PARAMS, jnp.asarray(tokens), SMALL)


def step(tokens: Any, cache: Any) -> tuple[Any, Any]:
    """Tokens after a cache; the cache knows how many it has seen."""
    seen, cache = cache or (0, ll.empty_cache(SMALL, 16, jnp.float32))
    seen_by, cache = llama(PARAMS, jnp.asarray(tokens), cache, jnp.array(seen), SMALL)
    return seen_by, (seen + len(tokens), cache)


def rows(tokens: Sequence[Any]) -> list[Any]:
    """Ragged rows padded behind and run as one."""
    width = max(map(len, tokens))
    padded = jnp.array([[*row, *[0] * (width - len(row))] for row in tokens])
    together = jax.jit(vmap(lambda row: ll.logits(PARAMS, row, SMALL)))(padded)
    return [scores[: len(row)] for scores, row in zip(together, tokens, strict=True)]


RAGGED = [TOKENS[:4], TOKENS[1:], TOKENS[:1], TOKENS[3:]]


def rotate(x: Any, position: int) -> Any:
    return ll.rope(jnp.asarray(x), ll.rope_angles(jnp.array(position), SMALL))


def with_heads(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    return logits(params, jnp.asarray(tokens), config)


def test_ours() -> None:
    ll.check_causality(model, TOKENS, SMALL.vocab)
    ll.check_cache(step, model, TOKENS, BOUND)
    ll.check_rows(rows, model, RAGGED, BOUND)
    ll.check_rotation(rotate, SMALL.head_dim, BOUND)
    ll.check_heads(with_heads, PARAMS, SMALL, TOKENS, BOUND)


@pytest.fixture(scope="module")
def theirs() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def test_transformers(theirs: LlamaForCausalLM) -> None:
    def whole(tokens: Any) -> Any:
        return theirs(torch.tensor(tokens)[None]).logits[0]

    def cached(tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = theirs(torch.tensor(tokens)[None], past_key_values=cache, use_cache=True)
        return out.logits[0], out.past_key_values

    ll.check_causality(whole, TOKENS, 29)
    ll.check_cache(cached, whole, TOKENS, BOUND)


def late(tokens: Any, cache: Any) -> tuple[Any, Any]:
    """A cache that is written one position late."""
    scores, (seen, cache) = step(tokens, cache)
    return scores, (seen + 1, cache)


def crossed(params: ll.Params, config: ll.Config, tokens: Any) -> Any:
    """The query heads of one group asking the keys of the one below."""
    assert not isinstance(params.blocks, ll.Block)
    shift = config.q_per_kv // 4
    blocks = [w._replace(attn=w.attn._replace(k=jnp.roll(w.attn.k, shift, 0))) for w in params.blocks]
    return with_heads(params._replace(blocks=tuple(blocks)), config, tokens)


BROKEN: dict[str, Callable[[], None]] = {
    "causality: a token sees the next": lambda: ll.check_causality(lambda t: model(t)[::-1], TOKENS, SMALL.vocab),
    "causality: tokens are not read": lambda: ll.check_causality(lambda t: model(TOKENS), TOKENS, SMALL.vocab),
    "cache: written late": lambda: ll.check_cache(late, model, TOKENS, BOUND),
    "rows: in another order": lambda: ll.check_rows(lambda t: rows(t[::-1]), model, [TOKENS, TOKENS[::-1]], BOUND),
    "rows: padded before": lambda: ll.check_rows(
        lambda t: [model([0, *row])[1:] for row in t], model, RAGGED, BOUND
    ),
    "rotation: of half the angle": lambda: ll.check_rotation(lambda x, m: rotate(x, m // 2), SMALL.head_dim, BOUND),
    "rotation: that adds": lambda: ll.check_rotation(lambda x, m: jnp.asarray(x) + m, SMALL.head_dim, BOUND),
    "rotation: none at all": lambda: ll.check_rotation(lambda x, m: jnp.asarray(x), SMALL.head_dim, BOUND),
    "heads: keys in another order than values": lambda: ll.check_heads(crossed, PARAMS, SMALL, TOKENS, BOUND),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_can_fail(name: str) -> None:
    with pytest.raises(AssertionError, match="got"):
        BROKEN[name]()
