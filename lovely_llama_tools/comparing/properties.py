"""What holds for any Llama: causality, a cache, ragged rows, rotations, heads, to call on your own.

A model is a function from token ids to logits, (seq) to (seq, vocab), in arrays that numpy can read. A check returns
None, or raises AssertionError saying where the property fails. What two programs compute is first compared without the
property, so that a wrong norm is not taken for a wrong cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from lovely_llama import Attention, Config, Params

BOUND = 1e-5  # relative, for float32: several times the rounding of two correct programs together (docs/numerics.md)


def plain(array: Any) -> Float[np.ndarray, "..."]:
    """An array in float64, torch's bfloat16 too, which numpy cannot read."""
    return np.asarray(array.detach().cpu().double() if hasattr(array, "detach") else array, np.float64)


def require(holds: bool, says: str) -> None:
    """Raise AssertionError unless it holds, under `python -O` too."""
    if not holds:
        raise AssertionError(says)


def same(got: Any, want: Any, bound: float, what: str) -> None:
    """Fail unless ‖got − want‖ ≤ bound ‖want‖; with a bound of 0, unless all values are equal."""
    a, b = plain(got), plain(want)
    require(a.shape == b.shape, f"{what}: got shape {a.shape}, expected {b.shape}")
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300))
    require(error <= bound, f"{what}: got a relative error of {error:.1e}, expected at most {bound:.0e}")


def logits_of(model: Callable[[Any], Any], tokens: Any) -> Float[np.ndarray, "seq vocab"]:
    """A model's logits, one row for each token."""
    scores = plain(model(tokens))
    fits = scores.ndim == 2 and len(scores) == len(tokens)
    require(fits, f"logits: got shape {scores.shape}, expected ({len(tokens)}, vocab)")
    return scores


def check_logits(
    model: Callable[[Any], Any], reference: Callable[[Any], Any], tokens: Any, bound: float = BOUND
) -> None:
    """A model gives the logits of the reference. Where it does not, no other check tells more."""
    same(logits_of(model, tokens), logits_of(reference, tokens), bound, "logits")


def check_causality(model: Callable[[Any], Any], tokens: Any, vocab: int) -> None:
    """Another token at t leaves all logits before t bit for bit the same, and changes those at t."""
    tokens = np.array(tokens)
    want = logits_of(model, tokens)
    for t in range(len(tokens)):
        other = tokens.copy()
        other[t] = (tokens[t] + 1) % vocab
        got = logits_of(model, other)
        same(got[:t], want[:t], 0.0, f"logits before a change at {t}")
        require(bool((got[t] != want[t]).any()), f"logits at a change at {t}: got the same, expected a change")


def check_cache(step: Callable[..., Any], model: Callable[[Any], Any], tokens: Any, bound: float = BOUND) -> None:
    """A prefill followed by decoding token by token gives the logits of the whole, for every length of the prefill.

    `step(tokens, cache)` returns logits and a cache, and takes None for an empty cache."""
    tokens = np.asarray(tokens)
    want = logits_of(model, tokens)
    same(step(tokens, None)[0], want, bound, "logits of the whole in one step, before a cache is read")
    for cut in range(1, len(tokens)):
        logits, cache = step(tokens[:cut], None)
        same(logits, want[:cut], bound, f"logits of a prefill of {cut}")
        for t in range(cut, len(tokens)):
            logits, cache = step(tokens[t : t + 1], cache)
            same(plain(logits)[-1], want[t], bound, f"logits at {t} after a prefill of {cut}")


def check_rows(
    rows: Callable[..., Any], model: Callable[[Any], Any], tokens: Sequence[Any], bound: float = BOUND
) -> None:
    """Rows of unequal lengths run as one batch, in either order, have the logits they have alone."""
    want = [logits_of(model, np.asarray(row)) for row in tokens]
    for row, alone in zip(tokens, want, strict=True):
        same(rows([row])[0], alone, bound, f"logits of the row of {len(row)} in a batch of its own")
    for order in (slice(None), slice(None, None, -1)):
        for got, alone, row in zip(rows(tokens[order]), want[order], tokens[order], strict=True):
            same(got, alone, bound, f"logits of the row of {len(row)}")


def check_rotation(rotate: Callable[[Any, int], Any], head_dim: int, bound: float = BOUND) -> None:
    """`rotate(x, position)` keeps norms, is the identity at 0, and gives products that depend on distance alone."""
    q, k = np.random.default_rng(0).normal(size=(2, head_dim)).astype(np.float32)
    scale = float(np.linalg.norm(q) * np.linalg.norm(k))

    def product(m: int, n: int) -> float:
        return float(plain(rotate(q, m)) @ plain(rotate(k, n)))

    same(rotate(q, 0), q, bound, "a vector rotated at 0")
    same(np.linalg.norm(plain(rotate(q, 77))), np.linalg.norm(q), bound, "a norm at 77")
    for distance in (0, 1, 63, 300):
        want = product(distance, 0)
        for position in (1, 64, 500):
            got = product(position + distance, position)
            same(got + scale, want + scale, bound, f"a product over distance {distance} at {position}")
    require(abs(product(1, 0) - product(0, 0)) > bound, "a product over distance 1: got that over 0")


def check_heads(model: Callable[..., Any], params: Params, config: Config, tokens: Any, bound: float = BOUND) -> None:
    """`model(params, config, tokens)` gives the same with other orders of heads, and keys and values for each of them.

    Your own model takes the parameters through lovely_llama_tools' `to_hf` or `to_llama2c`."""
    want = model(params, config, tokens)

    def each(change: Callable[[Attention], Attention]) -> Params:
        blocks = tuple(block._replace(attn=change(block.attn)) for block in params.blocks)
        return params._replace(blocks=blocks)

    def repeated(w: Attention) -> Attention:
        k, v = (jnp.repeat(rows, config.q_per_kv, axis=0) for rows in (w.k, w.v))
        q, o = w.q.reshape(len(k), 1, *w.q.shape[2:]), w.o.reshape(len(w.o), len(k), 1, -1)
        return Attention(q, k, v, o)

    ungrouped = replace(config, kv_heads=config.kv_heads * config.q_per_kv, q_per_kv=1)
    same(model(each(repeated), ungrouped, tokens), want, bound, "keys and values repeated for every query head")
    reverse = each(lambda w: Attention(w.q[::-1], w.k[::-1], w.v[::-1], w.o[:, ::-1]))
    same(model(reverse, config, tokens), want, bound, "key/value heads in another order")
    within = each(lambda w: w._replace(q=w.q[:, ::-1], o=w.o[:, :, ::-1]))
    same(model(within, config, tokens), want, bound, "query heads in another order")
