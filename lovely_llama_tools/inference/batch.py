"""Generating for many prompts at a time: sequences of different lengths share each pass over the weights."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax, vmap
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from lovely_llama import (
    Block,
    Cache,
    Config,
    LlamaError,
    Params,
    Sampling,
    check,
    is_whole,
    positions,
    readout,
)

from ..devices.partition import split
from ..extras import counted
from ..fast.layers import block, embed
from ..formats.model import Model, free_memory
from .caches import cache_sharding, everywhere, groups, new_cache, runnable, running
from .generate import Generation, Session, checked, no_others, program, prompt_tokens

BATCH = 8  # default number of prompts at a time: one pass over the weights then yields eight tokens


Settings = tuple[int, Sampling, int, list[str]]  # see `checked`


class Continuation(NamedTuple):
    """The continuation of a prompt."""

    text: str  # empty without a tokenizer
    tokens: list[int]
    reason: str  # why it ended: "stop", "length" or "context"


# ---- One token per row -----------------------------------------------------------------------------------------------


def over() -> Any:
    """The mesh axes over which rows are split."""
    return split(["batch"], jax.sharding.get_abstract_mesh().axis_names)[0]


@jax.jit
def rows_begin(params: Params, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq dim"]:
    """`embed` for the tokens of each row."""
    return vmap(lambda tokens: embed(params, tokens), spmd_axis_name=over())(tokens)


@partial(program, donate_argnames=("x", "cache"))
def rows_layer(
    w: Block, x: Float[Array, "batch 1 dim"], cache: Cache, starts: Int[Array, " batch"], config: Config
) -> tuple[Float[Array, "batch 1 dim"], Cache]:
    """`block` for every row: matrix-vector products become matrix-matrix products."""

    def row(x: Array, cache: Cache, start: Array) -> tuple[Array, Cache]:
        return block(w, x, cache, positions(start, 1, config), config.eps)

    return vmap(row, spmd_axis_name=over())(x, cache, starts)


@program
def rows_end(params: Params, x: Float[Array, "batch 1 dim"], config: Config) -> Float[Array, "batch vocab"]:
    """`readout` for the token of each row."""
    return vmap(lambda x: readout(params, x[0], config.eps))(x)


def at(array: Float[Array, "*shape"], place: NamedSharding | None) -> Float[Array, "*shape"]:
    """Constrain the sharding of an array, on a mesh."""
    return array if place is None else lax.with_sharding_constraint(array, place)


@partial(jax.jit, donate_argnames="rows", static_argnames="place")
def placed(
    rows: Float[Array, "batch kv_heads room head_dim"], row: Float[Array, "kv_heads ctx head_dim"],
    slot: Int[Array, ""], place: NamedSharding | None,
) -> Float[Array, "batch kv_heads room head_dim"]:  # fmt: skip
    """A layer's keys or values with one row replaced. Positions after that row's end are stale and never read."""
    return at(lax.dynamic_update_slice(rows, row[None, :, : rows.shape[2]], (slot, 0, 0, 0)), place)


@partial(jax.jit, static_argnames=("room", "place"))
def chosen(
    rows: Float[Array, "batch kv_heads ctx head_dim"], slots: Int[Array | np.ndarray, " slots"], room: int,
    place: NamedSharding | None,
) -> Float[Array, "slots kv_heads room head_dim"]:  # fmt: skip
    """Select rows of a layer's keys or values, and extend them to `room` positions."""
    return at(jnp.pad(rows[slots], ((0, 0), (0, 0), (0, room - rows.shape[2]), (0, 0))), place)


# ---- A batch ---------------------------------------------------------------------------------------------------------


class Row:
    """The row of a batch that belongs to one prompt; its `Generation` reads logits from it."""

    def __init__(self, batch: "Batch", number: int, prompt: list[int], settings: Settings) -> None:
        self.batch, self.model, self.number = batch, batch.model, number
        self.generation, self.parts = Generation(self, prompt, *settings), list[str]()
        self.most = min(settings[0], self.model.config.ctx - len(prompt))
        self.cached = False
        self.logits: Any = None  # after the last token, until `read_new` returns them

    def read_new(self, tokens: list[int]) -> tuple[Float[Array, " vocab"], int]:
        """The logits after the last token: a prompt is read by itself, a new token together with those of all rows."""
        if not self.cached:
            self.cached = True
            return self.batch.enter(self, tokens)
        if self.logits is None:
            self.batch.step()
        logits: Any = self.logits
        self.logits = None
        return logits, 1

    def advance(self) -> bool:
        """Choose the next token; whether the continuation has ended."""
        steps = self.generation.steps
        self.parts.append(str(next(steps, "")))
        ended = bool(self.generation.reason) or len(self.generation.tokens) == self.most
        self.parts += map(str, steps) if ended else ()  # text that was held back; reads no more logits
        return ended

    def continuation(self) -> Continuation:
        """The finished continuation."""
        text = "".join(self.parts) if self.model.tokenizer else ""
        return Continuation(text, self.generation.tokens, self.generation.reason)


class Batch:
    """Rows that advance together, and their cache. Idle rows are computed too, and ignored."""

    def __init__(self, model: Model, size: int) -> None:
        self.session = Session(model)  # reads prompts one by one, a common prefix only once
        self.model, each = self.session.model, groups(self.session.model.params)
        self.rows = list[Row | None]([None] * (each * max(1, -(-size // each))))
        self.cache: tuple[Cache, ...] = new_cache(self.model.params, model.config, 0, len(self.rows))

    def enter(self, row: Row, tokens: list[int]) -> tuple[Float[Array, " vocab"], int]:
        """Read a prompt into its row of the cache."""
        logits, new = self.session.read_new(tokens)
        self.reserve(len(tokens))
        slot = everywhere(self.model.params, np.array(self.rows.index(row), np.int32))
        place = cache_sharding(self.model.params, True)
        self.cache = jax.tree.map(lambda rows, one: placed(rows, one, slot, place), self.cache, self.session.cache)
        return logits, new

    def step(self) -> None:
        """Compute the logits after the last token of every row."""
        config, params = self.model.config, self.model.params
        tokens, starts = np.zeros((len(self.rows), 1), np.int32), np.zeros(len(self.rows), np.int32)
        active = [(slot, row) for slot, row in enumerate(self.rows) if row and row.cached]
        for slot, row in active:
            said = row.generation.tokens
            tokens[slot], starts[slot] = said[-1], len(row.generation.prompt) + len(said) - 1
        self.reserve(int(starts.max()) + 1)
        ends, layers, places = params._replace(blocks=()), list(self.cache), everywhere(params, starts)
        with running(params):
            x = rows_begin(ends, everywhere(params, tokens))
            for i, w in enumerate(params.blocks):
                x, layers[i] = rows_layer(w, x, layers[i], places, config)
            self.cache, logits = tuple(layers), rows_end(ends, x, config)
        for slot, row in active:
            row.logits = logits[slot]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens per row: 256, doubled as needed, at most the context."""
        room = 256
        while room < length:
            room *= 2
        room = min(room, self.model.config.ctx)
        if room > self.cache[0].keys.shape[2]:
            self._select([*range(len(self.rows))], room)

    def shrink(self) -> None:
        """Drop idle rows whenever that halves the batch."""
        active, size = [slot for slot, row in enumerate(self.rows) if row], len(self.rows)
        while 0 < len(active) <= size // 2 and size // 2 % groups(self.model.params) == 0:
            size //= 2
        if size < len(self.rows):
            slots = [*active, *(slot for slot, row in enumerate(self.rows) if not row)][:size]
            self.rows = [self.rows[slot] for slot in slots]
            self._select(slots, self.cache[0].keys.shape[2])

    def _select(self, slots: list[int], room: int) -> None:
        """Reduce the cache to these rows, with `room` positions; layer by layer, so as not to hold two whole caches."""
        config, params = self.model.config, self.model.params
        need = 2 * config.layers * config.kv_heads * config.head_dim * len(slots) * room * params.embed.dtype.itemsize
        free, gib = free_memory() + sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache)), 2**30
        says = f"{need / gib:.1f} GiB for the cache of {counted(len(slots), 'row')} of {counted(room, 'token')}"
        check("memory", f"{free / gib:.1f} GiB free", need <= free, says, "batch")
        layers, self.cache = list(self.cache), ()
        choose = partial(chosen, slots=np.array(slots, np.int32), room=room, place=cache_sharding(params, True))
        for i, layer in enumerate(layers):
            layers[i] = Cache(choose(layer.keys), choose(layer.values))
        self.cache = tuple(layers)


# ---- Generation ------------------------------------------------------------------------------------------------------


def generate_all(
    model: Model, prompts: Iterable[str | Sequence[int]], max_new: int | None = None,
    sampling: Sampling | None = None, seed: int = 0, stop: str | Sequence[str] = (), batch: int = BATCH,
    **others: object,
) -> Iterator[Continuation]:  # fmt: skip
    """Continue many prompts, at most `batch` at a time: an iterator of their continuations, in order.

    A text by itself is one prompt. Prompt i, counted from 0, is continued as by `generate` with the seed
    (seed + i) mod 2³², so that repeated prompts give different samples. Rows do not depend on each other; but
    matrix-matrix products sum in another order than matrix-vector products, so logits differ from those of `generate`
    by rounding, about 1e-6 of their size, and tokens only where two candidates are closer than that. All prompts are
    checked before the first is read.
    """
    no_others("generate_all", others)
    check("batch", repr(batch), is_whole(batch) and batch > 0, "a whole number from 1")
    most, sampling, seed, stop = checked(model, max_new, sampling, seed, stop)
    model, prompts, read = runnable(model), [prompts] if isinstance(prompts, str) else prompts, list[list[int]]()
    for i, prompt in enumerate(prompts):
        try:
            read.append(prompt_tokens(model, prompt))
        except LlamaError as error:
            file = error.file if error.file == "model" else f"prompts[{i}]"
            raise LlamaError(file, error.field, error.got, error.expected) from error
    return in_order(
        model, [(tokens, (most, sampling, (seed + i) % 2**32, stop)) for i, tokens in enumerate(read)], batch
    )


def in_order(model: Model, prompts: list[tuple[list[int], Settings]], size: int) -> Iterator[Continuation]:
    """The continuations, in order. When a row ends, the next prompt takes its place."""
    batch, ended, shown = Batch(model, min(size, len(prompts))), dict[int, Continuation](), 0
    waiting = deque(enumerate(prompts))
    while shown < len(prompts):
        for slot, row in enumerate(batch.rows):
            if not row and waiting:
                number, prompt = waiting.popleft()
                row = batch.rows[slot] = Row(batch, number, *prompt)
            if row and row.advance():
                ended[row.number], batch.rows[slot] = row.continuation(), None
        if not waiting:
            batch.shrink()
        while shown in ended:
            yield ended.pop(shown)
            shown += 1
