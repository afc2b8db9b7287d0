"""Bugs of what stands around the layers: embedding, readout, tokens, what was recorded, precision."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from lovely_llama import Config, Params

from ..variants import Words
from .bug import Bug, Tokens, matrices, q8_0, through

ALIGNED, SPECIAL, DTYPE = "record logits after each token", "add_special_tokens=False", "load in the file's dtype"
EMBEDDING = "jnp.asarray(params.embed)[tokens]"
LOGITS = "return llama(params, tokens, cache, 0, config, first)[0]"
OFFSETS = "ids as the tokenizer has them"


def recorded(new: str) -> tuple[Words, ...]:
    """Something else than `rows`, the logits."""
    return (Words("logits", LOGITS, f"{LOGITS.replace('return', 'rows =')}\n    return {new}"),)


def shifted(by: int) -> Bug:
    """All ids off by a number, those at the ends of the vocabulary exchanged."""
    way = "high" if by > 0 else "low"
    words = (Words("llama", "x = embed(params, ids)", f"x = embed(params, (ids + ({by})) % config.vocab)"),)
    return Bug(f"ids one too {way}", f"looks up ids one too {way}", OFFSETS, "SentencePiece offsets", words=words)


def smaller_logits(params: Params, config: Config) -> Params:
    return params._replace(norm=params.norm / config.dim**0.5)


def with_ties(params: Params, config: Config) -> Params:
    return params._replace(unembed=None)


def is_untied(config: Config) -> bool:
    return not config.tied


OF_EMBEDDING = (
    Bug("embedding scaled by sqrt(dim)", "multiplies the embedding by sqrt(dim)", "no scale", "Gemma, tensai#248",
        words=(Words("embed", EMBEDDING, f"{EMBEDDING} * params.embed.shape[1] ** 0.5"),)),
    Bug("embedding normalised", "normalises the embedding", "no norm after the embedding", words=(
        Words("llama", "x = embed(params, ids)", "x = embed(params, ids)\n"
              "    x = vmap(lambda x: rms_norm(x, jnp.ones_like(x), config.eps))(x)"),)),
    Bug("logits scaled by 1/sqrt(dim)", "divides the logits by sqrt(dim)", "no scale", "T5",
        params=smaller_logits),
    Bug("logits soft-capped", "caps logits at ±30 by a tanh", "no cap", "Gemma 2's readout", "logits of some size",
        words=recorded("30 * jnp.tanh(rows / 30)")),
    Bug("unembedding taken from the embedding", "has the embedding for the unembedding", "tie_word_embeddings is false",
        "TensorRT-LLM#2677", "an untied model", fits=is_untied,
        params=with_ties),
    Bug("id 0 taken for padding", "hides tokens of id 0 from all others", "0 is a token",
        "jax-llm-examples model.py:1024", "a prompt with id 0", words=(
            Words("llama", "positions(start, len(ids), config, first)", "positions(start, len(ids), config)._replace("
                  "first=jnp.broadcast_to(ids == 0, (len(ids), len(ids))))"),
            Words("attend", "(first <= position) & (position <= last)",
                  "(position <= last) & ~first\n    visible = visible | (~visible.any() & (position == last))"))),
    Bug("id 0 embedded as zeros", "has zeros for the embedding of id 0", "0 is a token", "padding_idx=0",
        "a prompt with id 0", words=(
            Words("embed", EMBEDDING, f"jnp.where((jnp.asarray(tokens) == 0)[:, None], 0, {EMBEDDING})"),)),
    shifted(1),
    shifted(-1),
)  # fmt: skip


def with_bos(count: int) -> Callable[[Tokens, int], Tokens]:
    """BOS in front of the ids, so many times."""

    def change(ids: Tokens, bos: int) -> Tokens:
        return np.concatenate([np.full(count, bos, ids.dtype), ids])

    return change


def without_first(ids: Tokens, bos: int) -> Tokens:
    return ids[1:] if len(ids) > 1 else ids


def in_reverse(ids: Tokens, bos: int) -> Tokens:
    return ids[::-1]


OF_TOKENS = (
    Bug("BOS put in front", "puts BOS in front of the ids", SPECIAL, "llama-cpp-python#1501", tokens=with_bos(1)),
    Bug("two BOS put in front", "puts BOS in front of the ids twice", SPECIAL, "llama-cpp-python#1537",
        tokens=with_bos(2)),
    Bug("first token lost", "does not read the first id", "keep BOS", "InfiniLM#388", "several tokens",
        tokens=without_first),
    Bug("tokens in reverse", "reads the ids from last to first", "first to last", tokens=in_reverse),
)  # fmt: skip

OF_RECORDING = (
    Bug("logits of the position before", "records the logits before it reads a token", ALIGNED,
        "an alignment, not a bug", "several tokens",
        words=recorded("jnp.concatenate([jnp.full_like(rows[:1], jnp.nan), rows[:-1]])")),
    Bug("logits of the next position", "records the logits after the next token", ALIGNED, "an alignment, not a bug",
        "several tokens", words=recorded("jnp.concatenate([rows[1:], jnp.full_like(rows[:1], jnp.nan)])")),
    Bug("log-probabilities", "records logarithms of probabilities", "record logits", "mlx-examples#1291",
        words=recorded("jax.nn.log_softmax(rows)")),
    Bug("probabilities", "records probabilities", "record logits", words=recorded("jax.nn.softmax(rows)")),
)  # fmt: skip


def divides(config: Config) -> bool:
    return not any(n % 32 for n in (config.dim, config.kv_heads * config.q_per_kv * config.head_dim, config.hidden_dim))


def all_through(dtype: Any) -> Callable[[Params, Config], Params]:
    return lambda params, _: jax.tree.map(lambda w: through(w, dtype), params)


OF_PRECISION = (
    Bug("weights rounded to bfloat16", "rounds weights to bfloat16", DTYPE, "", "weights finer than bfloat16",
        params=matrices(lambda w: through(w, jnp.bfloat16))),
    Bug("weights rounded to float16", "rounds weights to float16", DTYPE, "", "weights finer than float16",
        params=matrices(lambda w: through(w, jnp.float16))),
    Bug("checkpoint read in bfloat16", "rounds every tensor to bfloat16, gains too", DTYPE, "",
        "weights finer than bfloat16", params=all_through(jnp.bfloat16)),
    Bug("checkpoint read in float16", "rounds every tensor to float16, gains too", DTYPE,
        "easydel bridge.py:2253", "weights finer than float16", params=all_through(jnp.float16)),
    Bug("weights rounded to Q8_0", "has matrices in blocks of 8-bit numbers", "compare with the quantised file", "",
        "rows that 32 divides", params=matrices(q8_0), fits=divides),
)  # fmt: skip
