"""Every intermediate of a run by one name each: the library's own functions, with a note put around expressions.

A note is the identity. Outside `jit` it sees the values that the library computes, so what it adds up to is the
library's result bit for bit; and of the gradient, what arrives at each of these places.
"""

import importlib
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Primitive
from jaxtyping import Array, Float, Int

from lovely_llama import Config, Params, check, check_tokens

from ..formats.model import Model
from .variants import Words, variant

# Which have no complete types.
ad: Any = importlib.import_module("jax.interpreters.ad")
batching: Any = importlib.import_module("jax.interpreters.batching")

# Where each name is noted: between what a known bug may change. Heads come first, then tokens, then features: kv_heads,
# q_per_kv, seq, head_dim. What belongs together is one row.
NOTES = (
    (Words("llama", "caches = list[Cache]()", "x = note('embed', x)\n    caches = list[Cache]()"),),
    (Words("llama", "block(w, x, old, where, config.eps)", "block(w, x, old, where, config.eps)\n"
           "        x = note('out', x)"),),
    (Words("llama", "return vmap(lambda x: readout(params, x, config.eps))(x)",
           "return note('logits', vmap(lambda x: readout(params, x, config.eps))(x))"),),
    (Words("block", "y, cache = attention(w.attn, normed, cache, where)", "normed = note('attn_norm', normed)\n"
           "    y, cache = attention(w.attn, normed, cache, where)\n    y = note('attn', y)"),),
    (Words("block", "lambda x: swiglu(", "lambda x: note('ffn', swiglu(note('ffn_norm', "),
     Words("block", ", *w.ffn)", "), *w.ffn))")),
    (Words("attention", "w_k @ x", "note('k', w_k @ x)"),),
    (Words("attention", "w_q @ x", "note('q', w_q @ x)"),),
    (Words("attention", "vmap(remember)(w.k, w.v)",
           "Cache(*map(note, ('k_rotated', 'v'), vmap(remember)(w.k, w.v)))"),),
    (Words("attention", "return attend(where.query_scale * ",
           "return note('heads', attend(where.query_scale * note('q_rotated', "),
     Words("attention", ", *own, last, first)", "), *own, last, first))")),
    (Words("attend", "jnp.where(visible, scores, -jnp.inf)", "note('scores', jnp.where(visible, scores, -jnp.inf))"),),
    (Words("attend", "(weights @ ", "(note('weights', weights) @ "),),
    (Words("swiglu", "gate @ x", "note('gate', gate @ x)"),),
    (Words("swiglu", "up @ x", "note('up', up @ x)"),),
    (Words("swiglu", "down @ (", "down @ note('act', "),),
    (Words("readout", "jnp.inner(", "jnp.inner(note('norm', "), Words("readout", ", unembed)", "), unembed)")),
)  # fmt: skip
ONCE = ("embed", "norm", "logits")  # of a model; the others are of each layer, in the order in which it makes them
IN_LAYERS = (
    "attn_norm", "q", "q_rotated", "k", "k_rotated", "v", "scores", "weights", "heads", "attn", "ffn_norm", "gate",
    "up", "act", "ffn", "out",
)  # fmt: skip


class Notes:
    """What is noted in a run, in its order: values, or the gradients with respect to them."""

    def __init__(self, wanted: Collection[str], gradients: bool) -> None:
        self.wanted, self.gradients = wanted, gradients
        self.found: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in wanted}

    def note(self, name: str, x: Array) -> Array:
        """x, noted under a name if that is wanted."""
        return NOTE.bind(x, name=name, notes=self, mapped=()) if name in self.wanted else x

    def value(self, name: str, x: Any, mapped: Sequence[int]) -> Any:
        """What stands in the place of a value: itself."""
        if not self.gradients:
            self.add(name, x, mapped)
        return x

    def add(self, name: str, x: Any, mapped: Sequence[int]) -> None:
        """Keep a value, with the axes that each `vmap` has added brought to the front, the outermost first."""
        array = np.asarray(x)
        for place, axis in enumerate(reversed(mapped)):
            array = np.moveaxis(array, place + axis, place)
        self.found[name].append(array)


def identity(x: Any, **_: Any) -> Any:
    """x itself."""
    return x


def noted(x: Any, *, name: str, notes: Notes, mapped: tuple[int, ...]) -> Any:
    """What the primitive does where x is an array: without `jit`."""
    return notes.value(name, x, mapped)


def tangent(primals: Any, tangents: Any, **how: Any) -> Any:
    """The tangent of a note is that of its argument, with a place where the gradient will pass."""
    (t,) = tangents
    return NOTE.bind(*primals, **how), t if type(t) is ad.Zero else SLOPE.bind(t, **how)


def sloped(gradient: Any, _: Any, *, name: str, notes: Notes, mapped: tuple[int, ...]) -> Any:
    """Keep the gradient that arrives at a place, and pass it on."""
    if type(gradient) is not ad.Zero:
        notes.add(name, gradient, mapped)
    return [gradient]


def batched(primitive: Any, arguments: Any, axes: Any, *, mapped: tuple[int, ...], **how: Any) -> Any:
    """Under `vmap` a value has one axis more. It stays where it is, so that all is computed as without notes."""
    return primitive.bind(*arguments, mapped=(*mapped, *axes), **how), axes[0]


NOTE: Any = Primitive("note")
SLOPE: Any = Primitive("slope")
NOTE.def_impl(noted)
SLOPE.def_impl(identity)
for each in (NOTE, SLOPE):
    each.def_abstract_eval(identity)
    batching.primitive_batchers[each] = partial(batched, each)
ad.primitive_jvps[NOTE] = tangent
ad.primitive_transposes[SLOPE] = sloped


def names_of(config: Config) -> list[str]:
    """The names of a model's intermediates, in the order in which they are made."""
    layers = [f"layers.{layer}.{name}" for layer in range(config.layers) for name in IN_LAYERS]
    return ["embed", *layers, "norm", "logits"]


def trace(
    model: Model, tokens: Int[Any, " seq"] | Sequence[int], names: Collection[str] | None = None,
    *, gradients: bool = False,
) -> dict[str, Float[np.ndarray, "..."]]:  # fmt: skip
    """Every intermediate of a run on token ids, or those of some names; `names_of` lists them.

    `q` and `k` are before the rotation, `q_rotated` and `k_rotated` after it; `scores` are masked by −∞; `act` is
    silu(gate) ⊙ up. Heads come first, then tokens, then features: q is (kv_heads, q_per_kv, seq, head_dim). With
    `gradients`, in place of the values, the gradients with respect to them of the mean cross-entropy of each token
    given those before it. Attention's scores need heads · seq² of memory a layer.
    """
    config = model.config
    ids = check_tokens(tokens, config.vocab, config.ctx)
    known = names_of(config)
    for name in names or ():
        check("names", name, name in known, ", ".join([*ONCE, *(f"layers.N.{name}" for name in IN_LAYERS)]))
    wanted = known if names is None else [name for name in known if name in set(names)]
    notes = Notes({name.rpartition(".")[2] for name in wanted}, gradients)
    functions = variant([words for row in NOTES for words in row], {"note": notes.note})

    def loss(params: Params) -> Array:
        return functions.cross_entropy(functions.logits(params, ids, config)[:-1], jnp.asarray(ids[1:]))

    if gradients:
        check("tokens", "1 token", len(ids) > 1, "2 at least, as each is predicted from those before it")
        jax.grad(loss)(model.params)
    else:
        functions.logits(model.params, ids, config)
    order = -1 if gradients else 1
    found = {name: arrays[::order] for name, arrays in notes.found.items()}

    def of(name: str) -> Any:
        prefix, _, last = name.rpartition(".")
        return found[last][int(prefix.partition(".")[2]) if prefix else 0]

    return {name: of(name) for name in wanted}
