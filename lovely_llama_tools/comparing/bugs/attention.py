"""Bugs of scores, mask, softmax and heads."""

from dataclasses import replace
from typing import Any

from jax import numpy as jnp

from lovely_llama import Config, Params

from ..variants import Words
from .bug import Bug, attention, halves, neighbours, other_way, other_way_o, transposed
from .rotary import K, Q

SCALE = "divide by sqrt(head_dim)"
SEES = "a token sees itself and those before"
SQUARE = "heads that together are as wide as dim"
VISIBLE = "(first <= position) & (position <= last)"
SCORES = "float32_or_wider(keys) @ float32_or_wider(q) / math.sqrt(len(q))"
MASKED = "jnp.where(visible, scores, -jnp.inf)"
NORMED = "w_{0} @ x * lax.rsqrt(1e-6 + jnp.mean(float32_or_wider(w_{0} @ x) ** 2)).astype(x.dtype)"


def scaled(factor: str) -> tuple[Words, ...]:
    """Scores multiplied by a number."""
    old = "attention_factor**2 if config.rope_scaling else 1.0"
    return (Words("positions", old, f"attention_factor**2 * ({factor}) if config.rope_scaling else {factor}"),)


def attend(old: str, new: str) -> tuple[Words, ...]:
    return (Words("attend", old, new),)


def is_square(config: Config) -> bool:
    return config.kv_heads * config.q_per_kv * config.head_dim == config.dim


def is_grouped(config: Config) -> bool:
    return config.kv_heads > 1 and config.q_per_kv > 1


def has_several(config: Config) -> bool:
    return config.kv_heads > 1


def values_other_way(params: Params, config: Config) -> Params:
    """Keys and values for every query head, values tiled where keys are repeated."""
    heads = config.kv_heads * config.q_per_kv

    def ungrouped(w: Any, _: Config) -> Any:
        q, o = w.q.reshape(heads, 1, *w.q.shape[2:]), w.o.reshape(len(w.o), heads, 1, -1)
        return w._replace(q=q, k=jnp.repeat(w.k, config.q_per_kv, 0), v=jnp.tile(w.v, (config.q_per_kv, 1, 1)), o=o)

    return attention(ungrouped)(params, replace(config, kv_heads=heads, q_per_kv=1))


OF_SCORES = (
    Bug("scores not scaled", "takes q·k as it is", SCALE, "mlc-llm#3426", words=scaled("math.sqrt(config.head_dim)")),
    Bug("scores scaled twice", "divides q·k by head_dim", "divide by sqrt(head_dim) once", "sdpa scales too",
        words=scaled("1 / math.sqrt(config.head_dim)")),
    Bug("scores scaled by dim", "divides q·k by sqrt(dim)", SCALE, "train-llm-from-scratch#3, vit-pytorch#65",
        words=scaled("math.sqrt(config.head_dim / config.dim)")),
    Bug("scores scaled by dim / heads", "divides q·k by sqrt(dim / heads)", SCALE, "transformers#32857, vllm#2622",
        "head_dim other than dim / heads",
        words=scaled("math.sqrt(config.head_dim * config.kv_heads * config.q_per_kv / config.dim)")),
    Bug("scores scaled by the number of heads", "divides q·k by sqrt(heads)", SCALE, "tt-metal#56789",
        words=scaled("math.sqrt(config.head_dim / (config.kv_heads * config.q_per_kv))")),
    Bug("scores soft-capped", "caps scores at ±50 by a tanh", "no cap", "Gemma 2's attention", "scores of some size",
        words=attend(SCORES, f"50 * jnp.tanh({SCORES} / 50)")),
    Bug("no mask", "lets a token see all others", "mask later positions", "transformers#27819",
        words=attend(VISIBLE, "position >= 0")),
    Bug("mask one long", "lets a token see the next one", SEES, "GPT-SoVITS#965",
        words=attend(VISIBLE, "(first <= position) & (position <= last + 1)")),
    Bug("mask one short", "hides a token from itself; the first one's answer is 0", "a token sees itself too",
        "GPT-SoVITS#965", words=attend(
            f"softmax({MASKED})", "jnp.where(position < last, softmax(jnp.where(position < jnp.maximum(last, 1), "
            "scores, -jnp.inf)), 0)")),
    Bug("mask one short, the first row an average", "hides a token from itself; the first one sees all alike",
        "a token sees itself too", "GPT-SoVITS#965", words=attend(
            f"softmax({MASKED})", "softmax(jnp.where(position < last, scores, -1e30))")),
    Bug("each token sees itself alone", "keeps no keys and values of earlier tokens",
        "keep keys and values of earlier tokens", "a cache that is not kept",
        words=attend(VISIBLE, "position == last")),
    Bug("first token hidden", "hides the first token from all others", "mask padding by its place, not its id",
        "jax-llm-examples model.py:1024", words=(
            Words("attend", VISIBLE, "(position <= last) & ((position > 0) | (last == 0))"),
            Words("logits", "first)[0]", "first)[0].at[0].set(jnp.nan)"))),
    Bug("mask the other way", "lets a token see itself and later ones", "mask later positions, not earlier ones",
        "cs249r#1785", words=attend(VISIBLE, "position >= last")),
    Bug("a sliding window", "lets a token see the last 32 only", "no window", "Mistral's attention",
        "more than 32 tokens", words=attend(VISIBLE, f"{VISIBLE} & (last - 32 < position)")),
    Bug("softmax over queries", "normalises weights over the queries of a key", "softmax over the keys",
        "llms-from-scratch-rs#30, labml#146", words=(
            Words("attend", f"weights = softmax({MASKED})",
                  f"exps = jnp.exp({MASKED} - lax.pmax({MASKED}, 'queries'))\n"
                  "    weights = exps / lax.psum(exps, 'queries')"),
            Words("attention", "vmap(token)", "vmap(token, axis_name='queries')"))),
    Bug("mask after softmax", "sets weights of later tokens to 0 after normalising", "mask scores, not weights",
        words=attend(f"softmax({MASKED})", "jnp.where(visible, softmax(scores), 0)")),
    Bug("masked scores are 0, not -inf", "multiplies scores by the mask", "-inf before softmax", "scores * mask",
        words=attend(MASKED, "jnp.where(visible, scores, 0)")),
    Bug("unused cache slots seen", "sees zeros in the slots of the cache up to a multiple of 256",
        "mask slots not yet filled", "mlx-lm#1673", "a number of tokens that 256 does not divide", words=attend(
            f"softmax({MASKED})",
            f"softmax(jnp.append({MASKED}, jnp.zeros(-len(scores) % 256, scores.dtype)))[: len(scores)]")),
    Bug("an attention sink", "adds 1 to the sum of exponentials, as for a token without a value", "softmax alone",
        "gpt-oss's attention, softmax1", words=attend(
            f"softmax({MASKED})", f"softmax(jnp.append({MASKED}, jnp.zeros(1, scores.dtype)))[:-1]")),
    Bug("queries and keys normed", "normalises each head's query and key before rotating them", "no norm there",
        "Qwen3's attention", words=(
            Words("attention", Q, f"rope({NORMED.format('q')}, angles)"),
            Words("attention", K, f"rope({NORMED.format('k')}, angles)"))),
    Bug("cache in bfloat16", "rounds keys and values to bfloat16", "keep the file's dtype", words=(
        Words("attention", f"Cache({K}, w_v @ x)",
              f"Cache(through({K}, jnp.bfloat16), through(w_v @ x, jnp.bfloat16))"),)),
    Bug("cache in float16", "rounds keys and values to float16", "keep the file's dtype", words=(
        Words("attention", f"Cache({K}, w_v @ x)", f"Cache(through({K}, jnp.float16), through(w_v @ x, jnp.float16))"),
    )),
)  # fmt: skip

OF_HEADS = (
    Bug("query heads grouped the other way", "gives query head h the key/value head h mod kv_heads",
        "repeat_interleave keys and values, not tile", "llama-2-jax convert_params.py:17, nntile#347",
        "grouped queries", fits=is_grouped,
        params=attention(lambda w, _: w._replace(q=other_way(w.q), o=other_way_o(w.o)))),
    Bug("q grouped the other way", "orders the heads of q by their place in a group first, those of o not",
        "one order of heads", "", "grouped queries", fits=is_grouped,
        params=attention(lambda w, _: w._replace(q=other_way(w.q)))),
    Bug("o grouped the other way", "orders the heads of o by their place in a group first, those of q not",
        "one order of heads", "", "grouped queries", fits=is_grouped,
        params=attention(lambda w, _: w._replace(o=other_way_o(w.o)))),
    Bug("values grouped the other way", "tiles values, and repeats keys", "repeat_interleave values too",
        "", "grouped queries", fits=is_grouped, params=values_other_way),
    Bug("one key/value head for all", "gives all query heads the first key/value head", "num_key_value_heads",
        "LongBench#27", "several key/value heads", fits=has_several,
        params=attention(lambda w, _: w._replace(k=jnp.broadcast_to(w.k[:1], w.k.shape),
                                                 v=jnp.broadcast_to(w.v[:1], w.v.shape)))),
    Bug("heads not transposed back", "merges heads before it brings positions to the front",
        "transpose heads and positions before merging", "transformer-from-scratch#6", words=(
            Words("attention", "jnp.moveaxis(vmap(group)(w.q, cache), 2, 0)",
                  "vmap(group)(w.q, cache).reshape(len(x), *w.o.shape[1:])"),)),
    Bug("o transposed", "multiplies by o from the other side", "y = x @ W.T", "", SQUARE, fits=is_square,
        params=attention(lambda w, _: w._replace(o=transposed(w.o)))),
    Bug("q transposed", "multiplies by q, in Hugging Face's rows, from the other side", "y = x @ W.T", "", SQUARE,
        fits=is_square, params=attention(lambda w, _: w._replace(q=neighbours(transposed(halves(w.q)))))),
    Bug("q and o transposed", "multiplies by q, in Hugging Face's rows, and o from the other side", "y = x @ W.T",
        "", SQUARE, fits=is_square,
        params=attention(lambda w, _: w._replace(q=neighbours(transposed(halves(w.q))), o=transposed(w.o)))),
    Bug("q transposed, Meta's rows", "multiplies by q from the other side", "y = x @ W.T", "", SQUARE, fits=is_square,
        params=attention(lambda w, _: w._replace(q=transposed(w.q)))),
    Bug("q and o transposed, Meta's rows", "multiplies by q and o from the other side", "y = x @ W.T", "", SQUARE,
        fits=is_square, params=attention(lambda w, _: w._replace(q=transposed(w.q), o=transposed(w.o)))),
    Bug("k and v exchanged", "takes v, in Hugging Face's rows, for k, and k for v", "the order is q, k, v",
        "fused qkv", params=attention(lambda w, _: w._replace(k=neighbours(w.v), v=halves(w.k)))),
    Bug("k and v exchanged, Meta's rows", "takes v for k, and k for v", "the order is q, k, v", "fused qkv",
        params=attention(lambda w, _: w._replace(k=w.v, v=w.k))),
)  # fmt: skip
