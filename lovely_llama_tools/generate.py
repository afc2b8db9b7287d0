"""Text from a model, as a stream: the compiled programs, a session that keeps the cache, and generation itself."""

import codecs
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from lovely_llama import (
    Caches,
    Config,
    Params,
    Sampling,
    block,
    check,
    check_tokens,
    choose,
    embed_tokens,
    empty_cache,
    fold_layers,
    readout,
)

from .formats import Model
from .tokens import check_text

# On CPUs with 512-bit vectors, XLA uses half of each unless told otherwise. Worth some 7 % of the speed of decoding.
WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}

PREFILL = (512, 256, 64)  # prompts are read in pieces of these lengths, each compiled once; the last piece is padded

# One program serves all layers: it is compiled, kept and loaded once, however deep the model.
program = partial(jax.jit, static_argnames="config", compiler_options=WIDE_VECTORS)
read_tokens, read_layer = program(embed_tokens), program(block, donate_argnames=("x", "cache"))


@program
def read_out(
    params: Params, x: Float[Array, "seq dim"], last: Int[Array | np.ndarray, ""], config: Config
) -> Float[Array, " vocab"]:
    """`readout` of one of several tokens."""
    return readout(params, x[last], config)


def read(
    params: Params, tokens: Int[Array | np.ndarray, " seq"], cache: Caches, start: Int[Array | np.ndarray, ""],
    last: Int[Array | np.ndarray, ""], config: Config,
) -> tuple[Float[Array, " vocab"], Caches]:  # fmt: skip
    """`llama` for layers in a tuple, but the logits after token `last` only. Tokens after it are padding.

    Padding enters the cache too, and is overwritten later. The programs have compiler options of their own, so this
    cannot be traced into another one.
    """
    # Passing arrays to a program takes time: no layers go to programs that need none, and start is converted once.
    ends, start = params._replace(blocks=()), jnp.asarray(start)
    x, angles = read_tokens(ends, tokens, start, config)
    x, cache = fold_layers(lambda x, w, cache: read_layer(w, x, angles, cache, start, config), x, params.blocks, cache)
    return read_out(ends, x, last, config), cache


class Session:
    """The tokens of a conversation so far, and the cache that holds their keys and values."""

    def __init__(self, model: Model) -> None:
        self.model, self.tokens = model, list[int]()
        self.room, self.cache = 0, ()

    def rewind(self, tokens: Sequence[int]) -> list[int]:
        """Truncate to the longest common prefix with `tokens`; return the remainder, which is never empty."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.cache)):  # donated to a `read` that was interrupted
            self.tokens, self.room, self.cache = list[int](), 0, ()
        pairs = zip(self.tokens, tokens[:-1], strict=False)
        known = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.tokens), len(tokens) - 1))
        del self.tokens[known:]
        return list(tokens[known:])

    def feed(self, tokens: Sequence[int]) -> Float[Array, " vocab"]:
        """Append tokens, and return the logits after the last of them."""
        self.reserve(len(self.tokens) + len(tokens))
        while True:
            size = 1 if len(tokens) == 1 else next((size for size in PREFILL if size <= len(tokens)), PREFILL[-1])
            piece, tokens = tokens[:size], tokens[size:]
            padded, start, last = [*piece, *[0] * (size - len(piece))], len(self.tokens), len(piece) - 1
            padded, start, last = (np.array(n, np.int32) for n in (padded, start, last))
            logits, self.cache = read(self.model.params, padded, self.cache, start, last, self.model.config)
            self.tokens += piece
            if not tokens:
                return logits

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens and the padding behind them: 256 positions, doubled as needed, up to ctx.

        Writing past the end would not raise: `dynamic_update_slice` clamps the start, and overwrites earlier positions.
        """
        config, room = self.model.config, 256
        while room < length + PREFILL[-1]:
            room *= 2
        room = min(room, config.ctx + PREFILL[-1])
        if room > self.room:
            cache = empty_cache(config, room, self.model.params.embed.dtype)
            if self.cache:
                cache = jax.tree.map(lambda new, old: lax.dynamic_update_slice(new, old, (0, 0, 0)), cache, self.cache)
            self.room, self.cache = room, cache


class Generation(Iterator[str]):
    """A stream of text, in whole characters. At its end `reason` is "stop", "length" or "context"."""

    def __init__(
        self, session: Session, prompt: Sequence[int], max_new: int, sampling: Sampling, seed: int, stop: Sequence[str]
    ) -> None:
        self.session, self.prompt, self.tokens, self.reason = session, prompt, list[int](), ""
        self.times: list[float] = []  # of the start and of each token
        self._text = self._stream(self._choose(max_new, sampling, seed, stop), stop)

    def __next__(self) -> str:
        return next(self._text)

    def _choose(self, max_new: int, sampling: Sampling, seed: int, stop: Sequence[str]) -> Iterator[int]:
        """Token after token, until a stop token, `max_new` or the end of the context."""
        config, tokenizer = self.session.model.config, self.session.model.tokenizer
        stops = {tokenizer.specials[text] for text in stop if text in tokenizer.specials} | tokenizer.stops
        rng, new = jax.random.key(seed), self.session.rewind(self.prompt)
        seen = cast(Any, np.bincount(self.prompt, minlength=config.vocab) > 0)  # jit takes numpy arrays, too
        self.times = [time.perf_counter()]
        for position in range(len(self.prompt), config.ctx):
            if len(self.tokens) == max_new:
                self.reason = "length"
                return
            token, seen = choose(rng, cast(Any, np.int32(position)), self.session.feed(new), seen, sampling)
            new = [int(token)]
            self.times.append(time.perf_counter())
            if new[0] < 0:
                raise FloatingPointError(f"model: logits at position {position - 1}: got NaN or ∞, expected numbers")
            if new[0] in stops:
                self.reason = "stop"
                return
            self.tokens += new
            yield new[0]
        self.reason = "context"

    def _stream(self, tokens: Iterator[int], stop: Sequence[str]) -> Iterator[str]:
        """The text of tokens up to the first stop text. Whatever may be the beginning of one is held back."""
        decode, held = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
        pieces, prefix = self.session.model.tokenizer.pieces, self.session.model.tokenizer.prefix
        begun = any(pieces[token] for token in self.prompt)  # the prefix is removed at the beginning of a text only
        for token in tokens:
            held += decode(pieces[token] if begun else pieces[token].removeprefix(prefix))
            begun = begun or bool(pieces[token])
            if ends := [held.index(text) for text in stop if text in held]:
                self.reason, held = "stop", held[: min(ends)]
                break
            beginnings = (text[:n] for text in stop for n in range(1, len(text)))
            sure = len(held) - max((len(part) for part in beginnings if held.endswith(part)), default=0)
            if sure:
                yield held[:sure]
                held = held[sure:]
        else:
            held += decode(b"", True)
        if held:
            yield held


def generate(
    model: Model, prompt: str | Sequence[int], max_new: int | None = None, sampling: Sampling | None = None,
    seed: int = 0, stop: Sequence[str] = (), session: Session | None = None,
) -> Generation:  # fmt: skip
    """Continue a prompt: an iterator of the text that follows, generated as it is consumed.

    It ends at one of the tokenizer's stop tokens, before one of the texts in `stop` (the name of a special token stands
    for that token), after `max_new` tokens, or at the end of the context. On one machine, equal prompts and seeds give
    equal texts. A session keeps the cache for the next call, which then reads only what is new in its prompt.
    """
    config, tokenizer = model.config, model.tokenizer
    if isinstance(prompt, str):
        check_text("prompt", prompt)
        # No token is longer than the longest piece, so a text that is far too long is refused before it is tokenized.
        short = len(prompt) <= config.ctx * max(map(len, tokenizer.pieces))
        check("prompt", f"{len(prompt)} characters", short, f"at most {config.ctx} tokens")
        prompt = tokenizer.begin(prompt)
    tokens = check_tokens(prompt, config.vocab, config.ctx, "prompt").tolist()
    sampling = sampling or Sampling()
    sampling.check(config.vocab)
    max_new = config.ctx if max_new is None else max_new
    enough = type(max_new) is int and 0 <= max_new <= config.ctx
    check("max_new", max_new, enough, f"a whole number from 0 to {config.ctx}")
    check("seed", seed, type(seed) is int and 0 <= seed < 2**32, "a whole number from 0 to 4294967295")
    for text in stop:
        check("stop", "an empty text", bool(text), "a text")
        check_text("stop", text)
    return Generation(session or Session(model), tokens, max_new, sampling, seed, stop)
