"""Streaming text generation: the compiled programs, sessions that keep the cache, and the loop over tokens."""

import codecs
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from lovely_llama import (
    Block,
    Cache,
    Config,
    LlamaError,
    Params,
    Sampling,
    check,
    check_sampling,
    check_tokens,
    is_whole,
    positions,
    readout,
)

from ..devices.programs import WIDE_VECTORS, Program
from ..extras import counted
from ..fast import choose
from ..fast.layers import Caches, block, embed, fold_layers
from ..formats.model import Model
from ..tokens import Tokenizer, check_text
from .caches import everywhere, new_cache, runnable, running

PREFILL = (512, 256, 64)  # prompts are read in pieces of these lengths, each compiled once; the last one is padded

# What other libraries call arguments of `generate`.
ALIASES = {
    **dict.fromkeys(("max_new_tokens", "max_tokens", "max_gen_toks", "n_predict"), "max_new"),
    **dict.fromkeys(("stop_strings", "stop_sequences", "until"), "stop"),
    **dict.fromkeys(("key", "rng", "random_seed"), "seed"),
    "batch_size": "batch",
}

# One program serves all layers, so that compilation time does not depend on depth.
program = partial(Program, static_argnames="config", compiler_options=WIDE_VECTORS)
read_tokens = jax.jit(embed)


@partial(program, donate_argnames=("x", "cache"))
def read_layer(
    w: Block, x: Float[Array, "seq dim"], cache: Cache, start: Int[Array, ""], config: Config
) -> tuple[Float[Array, "seq dim"], Cache]:
    """`block` for tokens from `start` on. Angles are computed here: passing arrays would take longer."""
    return block(w, x, cache, positions(start, len(x), config), config.eps)


@program
def read_out(
    params: Params, x: Float[Array, "seq dim"], last: Int[Array | np.ndarray, ""], config: Config
) -> Float[Array, " vocab"]:
    """`readout` for token `last`."""
    return readout(params, x[last], config.eps)


def read(
    params: Params, tokens: Int[Array | np.ndarray, " seq"], cache: Caches, start: Int[Array | np.ndarray, ""],
    last: Int[Array | np.ndarray, ""], config: Config,
) -> tuple[Float[Array, " vocab"], Caches]:  # fmt: skip
    """`llama` layer by layer, with the logits after token `last` only. Tokens after `last` are padding.

    Padding enters the cache too, and is overwritten later. The programs have their own compiler options, so this cannot
    be traced as part of another program.
    """
    # Passing arrays takes time: programs that need no layers get none, and start is converted once.
    ends, start = params._replace(blocks=()), everywhere(params, start)
    x = read_tokens(ends, tokens)
    x, cache = fold_layers(lambda x, w, cache: read_layer(w, x, cache, start, config), x, params.blocks, cache)
    return read_out(ends, x, last, config), cache


@partial(jax.jit, static_argnames="room")
def widen(rows: Float[Array, "kv_heads ctx head_dim"], room: int) -> Float[Array, "kv_heads room head_dim"]:
    """Extend a layer's keys or values to `room` positions."""
    return jnp.pad(rows, ((0, 0), (0, room - rows.shape[1]), (0, 0)))


class Session:
    """The tokens read so far, and the cache of their keys and values.

    Thread-safe. Several generations may alternate in one session; each rereads the tokens that another has replaced.
    """

    def __init__(self, model: Model) -> None:
        self.given, self.model, self.tokens = model, runnable(model), list[int]()
        self.room, self.cache = 0, tuple[Cache, ...]()
        self._lock, self._preparation = threading.Lock(), threading.Thread()
        self._prepared = 0

    def logits(self, tokens: Sequence[int]) -> Float[Array, " vocab"]:
        """The logits after the last token. Only tokens after the longest prefix shared with the cache are read."""
        config = self.model.config
        return self.read_new(check_tokens(tokens, config.vocab, config.ctx).tolist())[0]

    def read_new(self, tokens: list[int]) -> tuple[Float[Array, " vocab"], int]:
        """`logits` without checks, and the number of tokens read."""
        with self._lock, running(self.model.params):
            new = self._truncate(tokens)
            count = len(new)
            self._reserve(len(tokens))
            if count == 1:  # when decoding; after a prompt there may be nothing to come
                self._look_ahead(len(tokens))
            while True:
                size = 1 if len(new) == 1 else next((size for size in PREFILL if size <= len(new)), PREFILL[-1])
                piece, new = new[:size], new[size:]
                padded, start, last = [*piece, *[0] * (size - len(piece))], len(self.tokens), len(piece) - 1
                padded, start, last = (np.array(n, np.int32) for n in (padded, start, last))
                logits, cache = read(self.model.params, padded, self.cache, start, last, self.model.config)
                self.cache = cast(tuple[Cache, ...], cache)
                self.tokens += piece
                if not new:
                    return logits, count

    def _truncate(self, tokens: list[int]) -> list[int]:
        """Truncate to the longest common prefix with `tokens`; return the remainder, never empty."""
        lost = any(
            leaf.is_deleted() for leaf in jax.tree.leaves(self.cache)
        )  # donated to a `read` that was interrupted
        if lost or len(self.cache) < self.model.config.layers:
            self.tokens, self.room, self.cache = list[int](), 0, ()
        known = min(len(self.tokens), len(tokens) - 1)
        if self.tokens[:known] != tokens[:known]:
            pairs = zip(self.tokens, tokens, strict=False)
            known = next(i for i, (old, new) in enumerate(pairs) if old != new)
        del self.tokens[known:]
        return tokens[known:]

    def _reserve(self, length: int) -> None:
        """Make room for `length` tokens and padding: 256 positions, doubled as needed, at most ctx and padding.

        Writing past the end would not raise: `dynamic_update_slice` clamps the start and overwrites earlier positions.
        """
        room = self._fitting(length)
        if not self.room:
            self.room, self.cache = room, new_cache(self.model.params, self.model.config, room)
        elif room > self.room:
            if self._preparation.ident:
                self._preparation.join()
            layers, self.cache = list(self.cache), ()  # an interruption leaves no cache; see `_truncate`
            for i, layer in enumerate(layers):  # one at a time, so as not to hold two whole caches
                layers[i] = Cache(widen(layer.keys, room), widen(layer.values, room))
            self.room, self.cache = room, tuple(layers)

    def _look_ahead(self, length: int) -> None:
        """When the cache is half full, compile for the next size in a thread, so that no token has to wait."""
        following = self._fitting(self.room)
        if 2 * length > self.room and following > max(self.room, self._prepared):
            self._prepared = following
            self._preparation = threading.Thread(target=self._prepare, args=(self.room, following))
            self._preparation.start()

    def _fitting(self, length: int) -> int:
        """The cache size for `length` tokens."""
        room = 256
        while room < length + PREFILL[-1]:
            room *= 2
        return min(room, self.model.config.ctx + PREFILL[-1])

    def _prepare(self, room: int, following: int) -> None:
        """Compile the programs that grow the cache and use the larger one, by running one layer on zeros."""
        config, params = self.model.config, self.model.params
        with running(params):
            (old,) = new_cache(params, replace(config, layers=1), room)
            cache = Cache(widen(old.keys, following), widen(old.values, following))
            zero = everywhere(params, np.array(0, np.int32))
            x = read_tokens(params._replace(blocks=()), np.zeros(1, np.int32))
            read_layer(params.blocks[0], x, cache, zero, config)


@runtime_checkable
class Reader(Protocol):
    """Where a `Generation` gets logits: a session, or a row of a batch."""

    model: Model

    def read_new(self, tokens: list[int]) -> tuple[Float[Array, " vocab"], int]: ...


class Generation(Iterator[Any]):
    """An iterator of text in whole characters; of token ids if the model has no tokenizer.

    After the last one `reason` is "stop", "length", "context" or "interrupted".
    """

    def __init__(
        self, session: Reader, prompt: list[int], max_new: int, sampling: Sampling, seed: int, stop: Sequence[str]
    ) -> None:
        self.session, self.prompt, self.tokens, self.reason = session, prompt, list[int](), ""
        self.cached = 0  # prompt tokens found in the session's cache
        self.times: list[float] = []  # of the start and of each token
        self.interrupted, self.said = False, list[Any]()
        tokens, tokenizer = self._choose(max_new, sampling, seed, stop), session.model.tokenizer
        self.steps: Iterator[Any] = tokens if tokenizer is None else self._stream(tokens, tokenizer, stop)

    def __next__(self) -> Any:
        while (part := next(self.steps)) == "":
            pass
        self.said.append(part)
        return part

    def __str__(self) -> str:
        """The whole text, or all ids. What has not been generated yet is generated now."""
        for _ in self:
            pass
        return "".join(self.said) if self.session.model.tokenizer else str(self.said)

    def __repr__(self) -> str:
        """Likewise, so that a notebook shows it."""
        return f"Generation({str(self)!r}, {self.reason!r})"

    def interrupt(self) -> None:
        """End before the next token. May be called from a thread or a signal handler."""
        self.interrupted = True

    def _choose(self, max_new: int, sampling: Sampling, seed: int, stop: Sequence[str]) -> Iterator[int]:
        """Choose tokens until a stop token, `max_new`, or the end of the context."""
        config, tokenizer = self.session.model.config, self.session.model.tokenizer
        stops = {tokenizer.specials[text] for text in stop if text in tokenizer.specials} if tokenizer else set[int]()
        stops |= tokenizer.stops if tokenizer else set()
        rng, every = jax.random.key(seed), [*self.prompt]
        seen = cast(Any, np.bincount(self.prompt, minlength=config.vocab) > 0)  # jit takes numpy arrays, too
        self.times = [time.perf_counter()]
        for position in range(len(self.prompt), config.ctx):
            if len(self.tokens) == max_new or self.interrupted:
                self.reason = "interrupted" if self.interrupted else "length"
                return
            logits, new = self.session.read_new(every)
            token, seen = choose(rng, cast(Any, np.int32(position)), logits, seen, sampling)
            token = int(token)
            self.cached = len(every) - new if not self.tokens else self.cached
            self.times.append(time.perf_counter())
            if token < 0:
                raise FloatingPointError(f"model: logits at position {position - 1}: got NaN or ∞, expected numbers")
            if token in stops:
                self.reason = "stop"
                return
            self.tokens.append(token)
            every.append(token)
            yield token
        self.reason = "context"

    def _stream(self, tokens: Iterator[int], tokenizer: Tokenizer, stop: Sequence[str]) -> Iterator[str]:
        """Decode tokens up to the first stop text; a suffix that could begin one is held back."""
        decode, held = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
        pieces, prefix = tokenizer.pieces, tokenizer.prefix
        begun = any(pieces[token] for token in self.prompt)  # the prefix is removed only at the start of a text
        for token in tokens:
            held += decode(pieces[token] if begun else pieces[token].removeprefix(prefix))
            begun = begun or bool(pieces[token])
            if ends := [held.index(text) for text in stop if text in held]:
                self.reason, held = "stop", held[: min(ends)]
                break
            beginnings = (text[:n] for text in stop for n in range(1, len(text)))
            sure = len(held) - max((len(part) for part in beginnings if held.endswith(part)), default=0)
            yield held[:sure]
            held = held[sure:]
        else:
            held += decode(b"", True)
        yield held


def generate(
    model: Model, prompt: str | Sequence[int], max_new: int | None = None, sampling: Sampling | None = None,
    seed: int = 0, stop: str | Sequence[str] = (), session: Session | None = None, **others: object,
) -> Generation:  # fmt: skip
    """Continue a prompt: an iterator of the generated text, computed as it is consumed.

    It ends at a stop token of the tokenizer, before any text in `stop` (the name of a special token means that token),
    after `max_new` tokens, or at the end of the context. On one machine, equal prompts and seeds give equal texts. A
    session keeps the cache for the next call, which then reads only the new part of its prompt. A model without a
    tokenizer takes and yields token ids.
    """
    no_others("generate", others)
    settings, tokens = checked(model, max_new, sampling, seed, stop), prompt_tokens(model, prompt)
    session = session or Session(model)
    same = all(a is b for a, b in zip(session.given, model, strict=True))
    check("session", "one of another model", same, "a session of the model that is to continue")
    return Generation(session, tokens, *settings)


def no_others(function: str, others: Mapping[str, object]) -> None:
    """Refuse further arguments of a function, as Python does; those with a name of their own here, by that name."""
    for name, value in others.items():
        check(name, repr(value), name not in Sampling._fields, f"sampling=Sampling({name}={value!r})")
        check(name, repr(value), name not in ALIASES, f"{ALIASES.get(name)}={value!r}")
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def checked(
    model: Model, max_new: int | None, sampling: Sampling | None, seed: int, stop: str | Sequence[str]
) -> tuple[int, Sampling, int, list[str]]:
    """Check the arguments of `generate` other than the prompt, and fill in defaults."""
    config, stop = model.config, [stop] if isinstance(stop, str) else list(stop)
    for text in stop:
        check("stop", "an empty text", bool(text), "a text")
        check_text("stop", text)
    if model.tokenizer is None and stop:
        raise LlamaError("model", "tokenizer", "none", "no stop texts")
    sampling = sampling or model.sampling or Sampling()
    check_sampling(sampling, config.vocab)
    max_new = config.ctx if max_new is None else max_new
    enough = is_whole(max_new) and 0 <= max_new <= config.ctx
    check("max_new", repr(max_new), enough, f"a whole number from 0 to {config.ctx}")
    check("seed", repr(seed), is_whole(seed) and 0 <= seed < 2**32, "a whole number from 0 to 4294967295")
    return int(max_new), sampling, int(seed), stop


def prompt_tokens(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """The checked tokens of a prompt."""
    config, tokenizer = model.config, model.tokenizer
    if isinstance(prompt, str):
        if tokenizer is None:
            raise LlamaError("model", "tokenizer", "none", "token ids for a prompt")
        prompt = encode_prompt(tokenizer, prompt, config.ctx)
    return check_tokens(prompt, config.vocab, config.ctx, "prompt").tolist()


def encode_prompt(tokenizer: Tokenizer, text: str, ctx: int) -> list[int]:
    """Tokenize a prompt. One that cannot fit into the context is refused before that."""
    check_text("prompt", text)
    short = len(text) <= ctx * max(map(len, tokenizer.pieces))  # no token is longer than the longest piece
    check("prompt", f"{len(text)} characters", short, f"at most {counted(ctx, 'token')}")
    return tokenizer.begin(text)
