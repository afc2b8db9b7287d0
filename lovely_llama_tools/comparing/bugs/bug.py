"""What a row of the catalogue holds, and a Llama with a bug put in."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from lovely_llama import Config, Params

from ...devices.programs import Program
from ..variants import Words, concerned, rewritten, variant

Tokens = Int[np.ndarray, " _"]
PARTS = ("rms_norm", "attention", "swiglu")  # of a layer
BOS = 1  # Llama's first tokenizer's; where a model has none of its own


class Bug(NamedTuple):
    """A way in which a Llama goes wrong: what it does, its cure, and the fault as a change of a correct Llama.

    The change is one or more of: other config fields, other parameters, other tokens, other words of the library.
    """

    name: str  # what the program does, in the field's words
    does: str  # the same as a sentence about the program, without its subject
    cure: str
    seen: str = ""  # public threads and files
    needs: str = ""  # what it takes to show, beyond a few tokens
    words: tuple[Words, ...] = ()
    config: Callable[[Config], Mapping[str, Any]] | None = None
    params: Callable[[Params, Config], Params] | None = None
    tokens: Callable[[Tokens, int], Tokens] | None = None  # of the ids and the id of BOS
    fits: Callable[[Config], bool] | None = None  # whether a model of such a config could have it; None: any could


class Llama(NamedTuple):
    """A Llama as data, with the functions that compute it."""

    functions: ModuleType
    params: Params
    config: Config
    tokens: Tokens

    def logits(self) -> Float[Array, "seq vocab"]:
        """Its logits on its tokens."""
        return self.functions.logits(self.params, self.tokens, self.config)


def with_bug(bug: Bug, params: Params, tokens: Tokens, config: Config, bos: int = BOS) -> Llama:
    """A Llama that has a bug."""
    ids = bug.tokens(tokens, bos) if bug.tokens else tokens
    changed = bug.params(params, config) if bug.params else params
    sizes: dict[str, Any] = {
        "layers": len(changed.blocks),
        "tied": changed.unembed is None,
        "kv_heads": len(changed.blocks[0].attn.k),
    }
    sizes["q_per_kv"] = config.kv_heads * config.q_per_kv // sizes["kv_heads"]
    if bug.config:
        sizes |= bug.config(config)
    return Llama(functions_with(bug.words), changed, unchecked(config, sizes), ids)


def both(a: Bug, b: Bug) -> Bug | None:
    """Two bugs in one Llama, the second after the first; None where they change the same words."""

    def config(c: Config) -> Mapping[str, Any]:
        return {**(a.config(c) if a.config else {}), **(b.config(c) if b.config else {})}

    def params(w: Params, c: Config) -> Params:
        w = a.params(w, c) if a.params else w
        return b.params(w, c) if b.params else w

    def tokens(ids: Tokens, bos: int) -> Tokens:
        ids = a.tokens(ids, bos) if a.tokens else ids
        return b.tokens(ids, bos) if b.tokens else ids

    words = (*a.words, *b.words)
    try:
        rewritten(words)
    except ValueError:
        return None
    return Bug(f"{a.name}, {b.name}", "", "", words=words, config=config, params=params, tokens=tokens)


@lru_cache(256)
def functions_with(words: tuple[Words, ...]) -> ModuleType:
    """The library with some words changed, which may use `through`.

    One layer is compiled, for all layers and all bugs that leave it as it is; where a bug changes it, its parts are, so
    that bugs share those that they leave as they are."""
    whole = "block" not in concerned({function for function, *_ in words})
    return variant(words, {"through": through}, dict.fromkeys(["block"] if whole else PARTS, compiled))


@lru_cache(256)
def compiled(function: Callable[..., Any]) -> Program:
    """A function as a program. It runs a few times only, and without optimisation is compiled sooner."""
    return Program(function, {"xla_backend_optimization_level": 0})


def through(x: Array, dtype: Any) -> Array:
    """x rounded to another dtype. Without the barrier XLA would leave out a conversion there and back."""
    return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)


def unchecked(config: Config, changes: Mapping[str, Any]) -> Config:
    """A config with some fields changed, to values too that `Config` would refuse."""
    new = object.__new__(Config)
    for field in fields(Config):
        object.__setattr__(new, field.name, changes.get(field.name, getattr(config, field.name)))
    return new


def fixed(**changes: Any) -> Callable[[Config], Mapping[str, Any]]:
    """Some fields of a config, whatever it says."""

    def fields_of(_: Config) -> Mapping[str, Any]:
        return changes

    return fields_of


# ---- Ways of changing parameters -------------------------------------------------------------------------------------


def blocks(change: Callable[[Any, Config], Any]) -> Callable[[Params, Config], Params]:
    """A change of each layer."""
    return lambda params, config: params._replace(blocks=tuple(change(block, config) for block in params.blocks))


def attention(change: Callable[[Any, Config], Any]) -> Callable[[Params, Config], Params]:
    """A change of each layer's attention."""
    return blocks(lambda block, config: block._replace(attn=change(block.attn, config)))


def feed_forward(change: Callable[[Any, Config], Any]) -> Callable[[Params, Config], Params]:
    """A change of each layer's feed-forward."""
    return blocks(lambda block, config: block._replace(ffn=change(block.ffn, config)))


def layers(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Callable[[Params, Config], Params]:
    """Other layers, or in another order."""
    return lambda params, config: params._replace(blocks=change(params.blocks))


def gains(change: Callable[[Array], Array]) -> Callable[[Params, Config], Params]:
    """A change of every norm's gain."""

    def changed(params: Params, config: Config) -> Params:
        new = blocks(lambda w, _: w._replace(attn_norm=change(w.attn_norm), ffn_norm=change(w.ffn_norm)))
        return new(params, config)._replace(norm=change(params.norm))

    return changed


def matrices(change: Callable[[Array], Array]) -> Callable[[Params, Config], Params]:
    """A change of every matrix."""
    return lambda params, config: jax.tree.map(lambda w: change(w) if w.ndim > 1 else w, params)


def neighbours(rows: Array) -> Array:
    """A head's rows from Hugging Face's order, first members of all rotary pairs first, to neighbouring pairs."""
    *heads, width, dim = rows.shape
    return rows.reshape(*heads, 2, width // 2, dim).swapaxes(-3, -2).reshape(rows.shape)


def halves(rows: Array) -> Array:
    """A head's rows from neighbouring pairs to Hugging Face's order."""
    *heads, width, dim = rows.shape
    return rows.reshape(*heads, width // 2, 2, dim).swapaxes(-3, -2).reshape(rows.shape)


def other_way(q: Array) -> Array:
    """Query heads of q such that head h reads key/value head h mod kv_heads, where it should read h // q_per_kv."""
    kv_heads, q_per_kv, *rest = q.shape
    return q.reshape(q_per_kv, kv_heads, *rest).swapaxes(0, 1)


def other_way_o(o: Array) -> Array:
    """The columns of o, to go with `other_way`."""
    return jnp.moveaxis(other_way(jnp.moveaxis(o, 0, -1)), -1, 0)


def transposed(w: Array) -> Array:
    """A square matrix transposed, whatever axes its rows or columns are split into."""
    size = len(w) if w.ndim == 4 and len(w) ** 2 == w.size else w.shape[-1]
    return w.reshape(size, size).T.reshape(w.shape)


def rotated(q: Array, turns: Any) -> Array:
    """Rows of heads, each pair turned by its angle in `turns`, whose axes are those of q without the last two."""
    *_, width, dim = q.shape
    a, b = jnp.moveaxis(q.reshape(*q.shape[:-2], width // 2, 2, dim), -2, 0)
    cos, sin = (f(jnp.asarray(turns))[..., None].astype(q.dtype) for f in (jnp.cos, jnp.sin))
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -2).reshape(q.shape)


def q8_0(w: Array) -> Array:
    """A matrix rounded to blocks of 32 whole numbers with a float16 scale, largest 127, as llama.cpp's Q8_0."""
    rows = np.asarray(w, np.float32).reshape(-1, 32)
    scale = np.abs(rows).max(1, keepdims=True) / 127
    whole = np.round(np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0))
    return jnp.asarray(whole * scale.astype(np.float16).astype(np.float32)).reshape(w.shape).astype(w.dtype)
