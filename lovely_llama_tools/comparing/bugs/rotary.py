"""Bugs of rotary frequencies, angles, and the rotation."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lovely_llama import Config, Params, RopeScaling, rope_frequencies

from ..variants import Words
from .bug import Bug, attention, fixed, halves, neighbours, rotated

LLAMA3 = "a llama3 scaling"
MIDDLE = "a llama3 scaling with pairs in its middle band"
THETA = "pass theta from the config"
FREQUENCY = "jnp.asarray(κ * f + (1 - κ) * (f / scaling.factor))"
EXPONENT = "(2 * i / config.head_dim)"
POSITION = "jnp.asarray(position, f.dtype)"
ROTATION = "[a * cos - b * sin, a * sin + b * cos]"
HALF = (
    Words("rope_frequencies", "κ * f + (1 - κ)", "(4 * i < config.head_dim) * (κ * f + (1 - κ)"),
    Words("rope_frequencies", "(f / scaling.factor))", "(f / scaling.factor)))"),
    Words("rope_frequencies", EXPONENT, "(4 * i / config.head_dim)"),
)
Q, K = "rope(w_q @ x, angles)", "rope(w_k @ x, angles)"
NEXT = "where.angles[1] - where.angles[0]"


def frequencies(new: str, old: str = FREQUENCY) -> tuple[Words, ...]:
    return (Words("rope_frequencies", old, new),)


def angles(new: str) -> tuple[Words, ...]:
    """Another angle than f · position."""
    return (Words("rope_angles", f"f * {POSITION}", new),)


def scaling(**changes: Any) -> Callable[[Config], dict[str, Any]]:
    """Other fields of the scaling, where there is one."""
    return lambda c: {"rope_scaling": c.rope_scaling and c.rope_scaling._replace(**changes)}


def llama3_without_need(factor: float) -> Callable[[Config], dict[str, Any]]:
    return lambda c: {"rope_scaling": c.rope_scaling or RopeScaling("llama3", factor, 8192, low=1.0, high=4.0)}


def another_factor(config: Config) -> dict[str, Any]:
    s = config.rope_scaling
    return {"rope_scaling": s and s._replace(factor=32.0 if s.factor == 8 else 8.0)}


def is_scaled(*kinds: str) -> Callable[[Config], bool]:
    """Whether a config has a scaling, of one of some kinds."""
    return lambda c: c.rope_scaling is not None and (not kinds or c.rope_scaling.kind in kinds)


def by_number_of_heads(w: Any, config: Config) -> Any:
    heads, (_, _, dim) = config.kv_heads * config.q_per_kv, w.k.shape
    return w._replace(k=halves(w.k).reshape(heads, 2, -1, dim).swapaxes(1, 2).reshape(w.k.shape))


def divides(config: Config) -> bool:
    return config.q_per_kv > 1 and config.head_dim % (2 * config.q_per_kv) == 0


def has_quarters(config: Config) -> bool:
    return config.head_dim % 4 == 0


def by_head(params: Params, config: Config) -> Params:
    """Each head turned by its number, q counted through all groups."""
    f = np.asarray(rope_frequencies(config))
    q = np.arange(config.kv_heads * config.q_per_kv).reshape(config.kv_heads, config.q_per_kv, 1) * f
    k = np.arange(config.kv_heads)[:, None] * f
    return attention(lambda w, _: w._replace(q=rotated(w.q, q), k=rotated(w.k, k)))(params, config)


def within_halves(rows: Any) -> Any:
    """Hugging Face's rows, a quarter of a head apart made neighbours within the first half."""
    *heads, width, dim = rows.shape
    return neighbours(halves(rows).reshape(*heads, 2, width // 2, dim)).reshape(rows.shape)


OF_FREQUENCIES = (
    Bug("theta 1e4", "rotates with a base of 10,000, whatever the config says", THETA,
        "EasyLM#117, airllm#368, levanter#649", config=fixed(theta=1e4)),
    Bug("theta 5e5", "rotates with a base of 500,000, whatever the config says", THETA,
        "nanotron#173", config=fixed(theta=5e5)),
    Bug("theta 1e6", "rotates with a base of 1,000,000, whatever the config says", THETA,
        "llama2.c#356", config=fixed(theta=1e6)),
    Bug("scaling left out", "leaves all rotary frequencies unscaled", "apply rope_scaling",
        "felafax#59, ANEForge#58, mlxcel#1355", "a scaling in the config", config=fixed(rope_scaling=None)),
    Bug("theta 1e4 and scaling left out", "rotates with a base of 10,000 and unscaled, whatever the config says",
        "read rope_parameters, where transformers 5 writes both", "mlx-lm llama.py:30", "a scaling", fits=is_scaled(),
        config=fixed(theta=1e4, rope_scaling=None)),
    Bug("scaling applied twice", "scales frequencies that are scaled already", "scale the frequencies once",
        "", "a scaling", fits=is_scaled(), words=(
            Words("rope_frequencies", "(config: Config)", "(config: Config, once: bool = False)"),
            Words("rope_frequencies", f"1 / config.theta ** {EXPONENT}", f"1 / config.theta ** {EXPONENT} if once else "
                  "np.asarray(rope_frequencies(config, True), float)"))),
    Bug("all pairs slowed alike", "divides every frequency by the factor", "leave fast pairs as they are",
        "mlx-examples#907", LLAMA3, fits=is_scaled("llama3", "yarn"), config=scaling(kind="linear")),
    Bug("ramp between slow and fast pairs inverted", "slows the faster of the pairs in the middle band more",
        "low_freq_factor is the smaller", "TransformerLens#910", MIDDLE, fits=is_scaled("llama3"),
        words=frequencies("np.where((κ > 0) & (κ < 1), 1 - κ, np.clip(κ, 0, 1))", "np.clip(κ, 0, 1)")),
    Bug("pairs between slow and fast slowed", "slows pairs in the middle band by the whole factor",
        "interpolate; low_freq_factor is the smaller", "tiny-vllm#1", MIDDLE, fits=is_scaled("llama3", "yarn"),
        words=frequencies("np.where(κ < 1, 0, 1)", "np.clip(κ, 0, 1)")),
    Bug("pairs between slow and fast left fast", "leaves pairs in the middle band as they are",
        "interpolate; low_freq_factor is the smaller", "", MIDDLE, fits=is_scaled("llama3", "yarn"),
        words=frequencies("np.where(κ > 0, 1, 0)", "np.clip(κ, 0, 1)")),
    Bug("slow pairs left and fast ones slowed", "slows fast pairs and leaves slow ones, and inverts the ramp between",
        "slow the pairs of long wavelength", "", LLAMA3, fits=is_scaled("llama3"),
        words=frequencies("1 - np.clip(κ, 0, 1)", "np.clip(κ, 0, 1)")),
    Bug("yarn's ramp turned round", "slows fast pairs and leaves slow ones",
        "fast pairs stay, slow ones are slowed", "litgpt model.py:1021", "a yarn scaling", fits=is_scaled("yarn"),
        words=frequencies("κ = (i - begin)", "κ = 1 - (i - begin)")),
    Bug("yarn's temperature left out", "does not scale scores by the square of attention_factor",
        "scale cosines and sines by attention_factor", "", "a yarn scaling", fits=is_scaled("yarn"),
        config=scaling(attention_factor=1)),
    Bug("frequencies multiplied by the factor", "multiplies slow frequencies by the factor", "divide by it",
        "", "a scaling", fits=is_scaled(), words=frequencies("(f * scaling.factor)", "(f / scaling.factor)")),
    Bug("scaling by another model's factor", "scales by 8, or by 32 where the config says 8",
        "read factor from the file", "presets that all say 8, where Llama 3.2 has 32", "a scaling", fits=is_scaled(),
        config=another_factor),
    Bug("another original context", "counts the turns of a pair in 8,192 positions, whatever the config says",
        "read original_max_position_embeddings from the file", "llama-models#166",
        "a scaling of another original context",
        fits=is_scaled("llama3", "yarn"), config=scaling(original_ctx=8192)),
    Bug("Llama 3.1's scaling without need", "scales frequencies as in Llama 3.1", "rope_scaling is null",
        "jax-llm-examples", "no scaling in the config", config=llama3_without_need(8.0)),
    Bug("Llama 3.2's scaling without need", "scales frequencies as in Llama 3.2", "rope_scaling is null",
        "jax-llm-examples", "no scaling in the config", config=llama3_without_need(32.0)),
    Bug("positions divided by 2", "halves all positions", "rope_scaling is null",
        words=angles(f"f * ({POSITION} / 2)")),
    Bug("exponent over dim", "has frequencies theta^(-2i/dim)", "divide by head_dim",
        "mini-llama", words=frequencies("(2 * i / config.dim)", EXPONENT)),
    Bug("exponent i/d", "has frequencies theta^(-i/d)", "the exponent is 2i/d",
        "mini-llama", words=frequencies("(i / config.head_dim)", EXPONENT)),
    Bug("exponent 4i/d", "has frequencies theta^(-4i/d)", "the exponent is 2i/d",
        words=frequencies("(4 * i / config.head_dim)", EXPONENT)),
    Bug("exponent 2(i-1)/d", "has frequencies theta^(-2(i-1)/d)", "i starts at 0",
        "mini-llama rope_encoding.py:9", words=frequencies("(2 * (i - 1.0) / config.head_dim)", EXPONENT)),
    Bug("exponent 2(i+1)/d", "has frequencies theta^(-2(i+1)/d)", "i starts at 0",
        words=frequencies("(2 * (i + 1) / config.head_dim)", EXPONENT)),
    Bug("frequencies in reverse", "gives the first pair the lowest frequency", "the first pair is the fastest",
        words=frequencies(f"{FREQUENCY}[::-1]")),
    Bug("frequencies in bfloat16", "rounds frequencies to bfloat16", "keep inv_freq in float32",
        "transformers#25681, #29285", words=frequencies(f"through({FREQUENCY}, jnp.bfloat16)")),
    Bug("frequencies in float16", "rounds frequencies to float16", "keep inv_freq in float32",
        "transformers#29285", words=frequencies(f"through({FREQUENCY}, jnp.float16)")),
    Bug("angles in bfloat16", "rounds angles to bfloat16", "compute angles in float32",
        "sglang-jax#1472", words=angles(f"through(f * {POSITION}, jnp.bfloat16)")),
    Bug("cosines and sines in bfloat16", "rounds cosines and sines to bfloat16", "keep the table in float32",
        "a table that `.to(bfloat16)` converts", words=(Words("rope",
            "jnp.cos(angles).astype(a.dtype), jnp.sin(angles).astype(a.dtype)",
            "(through(f(angles), jnp.bfloat16).astype(a.dtype) for f in (jnp.cos, jnp.sin))"),)),
    Bug("positions in bfloat16", "rounds positions to bfloat16, which has whole numbers up to 256 only",
        "keep positions in float32", "transformers#29285", "more than 256 tokens",
        words=angles(f"f * through({POSITION}, jnp.bfloat16)")),
    Bug("all of the rotation's table in bfloat16", "rounds frequencies, positions and angles to bfloat16",
        "keep inv_freq in float32 when the model is cast", "x-transformers x_transformers.py:879",
        "more than 256 tokens", words=frequencies(f"through({FREQUENCY}, jnp.bfloat16)")
        + angles(f"through(f * through({POSITION}, jnp.bfloat16), jnp.bfloat16)")),
    Bug("positions past the original context take its last row",
        "reads rotary angles from a table that ends at the original context", "a table as long as the context",
        "a table of original_max_position_embeddings rows", "a scaling, and a prompt beyond its original context",
        fits=is_scaled("llama3", "yarn"),
        words=angles(f"f * jnp.minimum({POSITION}, config.rope_scaling.original_ctx - 1)")),
    Bug("rotation left out", "does not rotate queries and keys", "rotate q and k",
        "a cache whose start is ignored looks the same", words=angles(f"f * {POSITION} * 0")),
    Bug("rotated backwards", "rotates by the negative angle, or exchanges cosine and sine",
        "a cos - b sin, a sin + b cos", words=angles(f"-f * {POSITION}")),
    Bug("positions from 1", "counts positions from 1", "count positions from 0",
        "prime-rl#3466", "more than logits: scores depend on distances alone", words=angles(f"f * ({POSITION} + 1)")),
)  # fmt: skip

OF_ROTATION = (
    Bug("Meta's rows rotated as halves",
        "pairs row i of a head with row i + head_dim/2, where the checkpoint pairs neighbours; or has permuted rows of "
        "q and k that needed none", "pair neighbouring rows, or permute q and k", "llama2.c#286, LLMs-from-scratch#747",
        params=attention(lambda w, _: w._replace(q=neighbours(w.q), k=neighbours(w.k)))),
    Bug("Hugging Face's rows rotated as neighbours",
        "pairs neighbouring rows, where the checkpoint pairs row i of a head with row i + head_dim/2",
        "pair row i with i + head_dim/2, or permute q and k back", "transformers#25199, shainet#111, meganeura#38",
        params=attention(lambda w, _: w._replace(q=halves(w.q), k=halves(w.k)))),
    Bug("rows of k left as Hugging Face has them", "permutes rows of q, but not of k", "permute k too", "TinyLlama#24",
        params=attention(lambda w, _: w._replace(k=halves(w.k)))),
    Bug("rows of q left as Hugging Face has them", "permutes rows of k, but not of q", "permute q too", "TinyLlama#24",
        params=attention(lambda w, _: w._replace(q=halves(w.q)))),
    Bug("rows of k permuted by the number of query heads", "permutes rows of k as if it had as many heads as q",
        "use num_key_value_heads", "llama.cpp#3364, transformers#31788",
        "kv_heads · head_dim that twice the number of query heads divides", params=attention(by_number_of_heads),
        fits=divides),
    Bug("rows of q and k permuted twice", "permutes rows of q and k once more, to Hugging Face's order",
        "permute once", "llama2.c#403", "a head_dim above 8; with less, it is Meta's rows rotated as halves",
        params=attention(lambda w, _: w._replace(q=halves(halves(w.q)), k=halves(halves(w.k))))),
    Bug("rows of q and k permuted back twice", "permutes rows of q and k once more, from Hugging Face's order",
        "permute once", "", "a head_dim above 8; with less, it is Hugging Face's rows rotated as neighbours",
        params=attention(lambda w, _: w._replace(q=neighbours(neighbours(w.q)), k=neighbours(neighbours(w.k))))),
    Bug("rotation without its sines", "multiplies by the cosines alone", "add rotate_half(x) sin",
        "BabyLlama models.py:53", words=(Words("rope", ROTATION, "[a * cos, b * cos]"),)),
    Bug("a sign of the rotation", "has a cos + b sin for the first member of a pair", "a cos - b sin",
        words=(Words("rope", ROTATION, "[a * cos + b * sin, a * sin + b * cos]"),)),
    Bug("the other sign of the rotation", "has b cos - a sin for the second member of a pair", "a sin + b cos",
        words=(Words("rope", ROTATION, "[a * cos - b * sin, b * cos - a * sin]"),)),
    Bug("second half of the rotation from the first", "has overwritten a when it computes a sin + b cos",
        "keep the old a", "in-place rotation", words=(
            Words("rope", ROTATION, "[a * cos - b * sin, (a * cos - b * sin) * sin + b * cos]"),)),
    Bug("rotated twice", "rotates queries and keys twice", "rotate once",
        "rope inside and outside the cache", words=angles(f"f * (2 * {POSITION})")),
    Bug("half of each head rotated", "rotates the first half of each head's rows, with frequencies for that width",
        "rotate all of head_dim", "partial_rotary_factor",
        words=HALF),
    Bug("half of each head rotated, Hugging Face's rows",
        "rotates the first half of each head's rows, in pairs a quarter of a head apart",
        "rotate all of head_dim", "partial_rotary_factor", fits=has_quarters,
        params=attention(lambda w, _: w._replace(q=within_halves(w.q), k=within_halves(w.k))),
        words=HALF),
    Bug("keys not rotated", "rotates queries alone", "rotate q and k",
        words=(Words("attention", K, "w_k @ x"),)),
    Bug("queries not rotated", "rotates keys alone", "rotate q and k", words=(Words("attention", Q, "(w_q @ x)"),)),
    Bug("values rotated", "rotates values too", "rotate q and k alone", "mini-llama model.py:147",
        words=(Words("attention", "w_v @ x)", "rope(w_v @ x, angles))"),)),
    Bug("queries one position ahead", "rotates a query by the next token's position",
        "a token's position is the number of those before it", "transformers#37414",
        words=(Words("attention", Q, f"rope(w_q @ x, angles + ({NEXT}))"),)),
    Bug("queries one position behind", "rotates a query by the position of the token before",
        "a token's position is the number of those before it", "transformers#37414",
        words=(Words("attention", Q, f"rope(w_q @ x, angles - ({NEXT}))"),)),
    Bug("rotated by the head's number", "takes the number of a head for the position",
        "transpose heads and positions before rotating", "unsqueeze_dim", "grouped queries, or it is rotation left out",
        params=by_head, words=angles(f"f * {POSITION} * 0")),
)  # fmt: skip
