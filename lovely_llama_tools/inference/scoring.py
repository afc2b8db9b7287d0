"""Scoring texts: the negative log-likelihood of each token, and perplexity over a sliding window."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lovely_llama import (
    Block,
    Cache,
    Config,
    LlamaError,
    Params,
    check,
    check_tokens,
    float32_or_wider,
    is_whole,
    positions,
    readout,
)

from ..devices.programs import Program
from ..extras import progress
from ..fast.layers import block
from ..formats.model import Model
from ..tokens import check_text, encode_parts
from .batch import over, rows_begin
from .caches import everywhere, groups, new_cache, runnable, running

CTX = 2048  # default window, unless the model's context is shorter
PIECE = 64  # tokens whose logits are in memory at a time; windows are padded to PIECE · 2ⁿ


class Scores(NamedTuple):
    """For each target, −log p in nats, and whether it is the most likely token."""

    nats: Float[np.ndarray, " seq"]
    likeliest: Bool[np.ndarray, " seq"]


class Score(NamedTuple):
    """The score of a whole text."""

    nats: float
    tokens: int  # number of scored tokens
    bytes: int | None  # their length as text; unknown without a tokenizer

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean cross-entropy); ∞ if that overflows float64."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The mean cross-entropy in bits per byte of text, comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def negative_log_likelihoods(
    params: Params, x: Float[Array, "seq dim"], targets: Int[Array, " seq"], config: Config
) -> tuple[Float[Array, " seq"], Bool[Array, " seq"]]:
    """−log softmax(logits)ₜ of each target t, and whether it is the most likely; PIECE tokens at a time."""

    def token(x: Float[Array, " dim"], target: Int[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        scores = float32_or_wider(readout(params, x, config.eps))
        return jax.nn.logsumexp(scores) - scores[target], jnp.argmax(scores) == target

    def piece(carry: None, both: tuple[Array, Array]) -> tuple[None, Any]:
        return carry, vmap(token)(*both)

    _, (nats, likeliest) = lax.scan(piece, None, (x.reshape(-1, PIECE, x.shape[-1]), targets.reshape(-1, PIECE)))
    return nats.ravel(), likeliest.ravel()


@partial(Program, static_argnames="config")
def layer(w: Block, x: Float[Array, "batch seq dim"], cache: Cache, config: Config) -> Float[Array, "batch seq dim"]:
    """`block` for the tokens of every row, from position 0 on, without the resulting cache."""

    def row(x: Array, cache: Cache) -> Array:
        return block(w, x, cache, positions(0, len(x), config), config.eps)[0]

    return vmap(row, spmd_axis_name=over())(x, cache)


@partial(Program, static_argnames="config")
def score(
    params: Params, x: Float[Array, "batch seq dim"], targets: Int[Array, "batch seq"], config: Config
) -> tuple[Float[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """`negative_log_likelihoods` for every row."""
    return vmap(lambda x, t: negative_log_likelihoods(params, x, t, config), spmd_axis_name=over())(x, targets)


def scores(model: Model, tokens: Sequence[int], targets: Sequence[int]) -> Scores:
    """Score targets: target i given tokens 0 … i."""
    ((_, found),) = scored(model, [(tokens, targets)], 1)
    return found


def scored(
    model: Model, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch: int
) -> Iterator[tuple[int, Scores]]:
    """`scores` of many rows of tokens and targets, `batch` at a time, the longest first: each with its number.

    Causality makes padding at the end harmless. Rows that fill up a batch are computed too, and ignored.
    """
    config, params = model.config, runnable(model).params
    for tokens, targets in rows:
        check_tokens(tokens, config.vocab, config.ctx)
        check_tokens(targets, config.vocab, len(tokens))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    ends, each, batch = params._replace(blocks=()), groups(params), min(batch, len(rows))
    for some in (order[i : i + batch] for i in range(0, len(order), batch)):
        size = PIECE
        while size < len(rows[some[0]][0]):
            size *= 2
        padded, wanted = np.zeros((2, -(-batch // each) * each, size), np.int32)
        for row, i in enumerate(some):
            tokens, targets = rows[i]
            padded[row, : len(tokens)], wanted[row, : len(tokens)] = tokens, targets
        with running(params):
            (cache,) = new_cache(params, replace(config, layers=1), size, len(padded))
            x = rows_begin(ends, everywhere(params, padded))
            for w in params.blocks:
                x = layer(w, x, cache, config)
            nats, likeliest = (np.asarray(array) for array in score(ends, x, everywhere(params, wanted), config))
        for row, i in enumerate(some):
            found = Scores(nats[row, : len(rows[i][0])], likeliest[row, : len(rows[i][0])])
            if not np.isfinite(found.nats).all():
                raise FloatingPointError("model: logits: got NaN or ∞, expected numbers")
            yield i, found


def windows(count: int, ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, end, and first scored token of each window over `count` tokens. All but token 0 are scored, once.

    As in transformers' documentation: windows start every `stride` tokens and score the tokens that are new in them."""
    done = 1
    for begin in range(0, count, stride):
        end = min(begin + ctx, count)
        if end > done:
            yield begin, end, done
        done = end
        if end == count:
            return


def perplexity(model: Model, text: str | Sequence[int], ctx: int | None = None, stride: int | None = None) -> Score:
    """Score a text or token ids in windows of `ctx` tokens that advance by `stride`, by default half of ctx.

    Every token is scored once, given at least ctx − stride tokens if there are that many before it. BOS comes first if
    the model expects it, and is not scored; otherwise the first token of the text is not scored, having no context."""
    config, tokenizer = model.config, model.tokenizer
    ctx = min(config.ctx, CTX) if ctx is None else ctx
    check("ctx", repr(ctx), is_whole(ctx) and 2 <= ctx <= config.ctx, f"a whole number from 2 to {config.ctx}")
    stride = ctx // 2 if stride is None else stride
    check("stride", repr(stride), is_whole(stride) and 1 <= stride < ctx, f"a whole number from 1 to {ctx - 1}")
    if isinstance(text, str):
        check_text("text", text)
        check("text", "nothing", bool(text), "a text")
        if tokenizer is None:
            raise LlamaError("model", "tokenizer", "none", "token ids for a text")
        bos = [tokenizer.bos] if tokenizer.adds_bos else []
        both = chain([bos], encode_parts(tokenizer, text))
        ids: Any = np.concatenate([np.array(some, np.int32) for some in both])
    else:
        ids = text
    tokens = check_tokens(ids, config.vocab, max(len(ids), 1), "text")
    check("text", f"{len(tokens)} token", len(tokens) > 1, "at least 2 tokens, one to be scored after another", "text")
    nats = 0.0
    with progress("scoring", len(tokens) - 1, " tokens") as advance:
        for begin, end, first in windows(len(tokens), int(ctx), int(stride)):
            found = scores(model, tokens[begin : end - 1].tolist(), tokens[begin + 1 : end].tolist())
            nats += float(found.nats[first - begin - 1 :].astype(np.float64).sum())
            advance(end - first)
    size = None
    if tokenizer is not None:
        known = isinstance(text, str) and tokens[0] == tokenizer.bos and tokenizer.adds_bos
        size = len(str(text).encode()) if known else sum(len(tokenizer.pieces[int(token)]) for token in tokens[1:])
    return Score(nats, len(tokens) - 1, size)
