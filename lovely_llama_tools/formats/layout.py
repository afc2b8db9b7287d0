"""How other programs name and arrange what we have: parameters and rotary scalings."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from lovely_llama import (
    Config,
    Params,
    RopeScaling,
    check,
    check_params,
    check_tensors,
    is_number,
    is_whole,
    shapes,
)

from ..devices.partition import is_stacked
from ..fast.layers import shapes_in_tuple


class Layout(NamedTuple):
    """How one family of formats arranges parameters."""

    column: int  # in NAMES
    half_split: bool  # in q and k, a head's rows hold the first members of all rotary pairs, then the second ones


LLAMA2C, GGUF, HUGGING_FACE = Layout(0, False), Layout(1, False), Layout(2, True)
OURS = Layout(-1, False)  # which needs no table: names and shapes are those of our own tree

# A parameter's name in llama2.c and Meta, in GGUF, and in Hugging Face; in the order of llama2.c's files.
NAMES = {
    "embed": ("tok_embeddings", "token_embd", "model.embed_tokens"),
    "attn_norm": ("layers.{}.attention_norm", "blk.{}.attn_norm", "model.layers.{}.input_layernorm"),
    "q": ("layers.{}.attention.wq", "blk.{}.attn_q", "model.layers.{}.self_attn.q_proj"),
    "k": ("layers.{}.attention.wk", "blk.{}.attn_k", "model.layers.{}.self_attn.k_proj"),
    "v": ("layers.{}.attention.wv", "blk.{}.attn_v", "model.layers.{}.self_attn.v_proj"),
    "o": ("layers.{}.attention.wo", "blk.{}.attn_output", "model.layers.{}.self_attn.o_proj"),
    "ffn_norm": ("layers.{}.ffn_norm", "blk.{}.ffn_norm", "model.layers.{}.post_attention_layernorm"),
    "gate": ("layers.{}.feed_forward.w1", "blk.{}.ffn_gate", "model.layers.{}.mlp.gate_proj"),
    "down": ("layers.{}.feed_forward.w2", "blk.{}.ffn_down", "model.layers.{}.mlp.down_proj"),
    "up": ("layers.{}.feed_forward.w3", "blk.{}.ffn_up", "model.layers.{}.mlp.up_proj"),
    "norm": ("norm", "output_norm", "model.norm"),
    "unembed": ("output", "output", "lm_head"),
}


def tensor(layout: Layout, path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """A parameter's name and shape in a file: in layouts of others a gain is a vector, all else a matrix [out, in]."""
    if layout == OURS:
        return jax.tree_util.keystr(path, simple=True, separator="."), shape
    layer, field = [key.idx for key in path if hasattr(key, "idx")], path[-1].name
    if len(shape) > 1:
        shape = (shape[0], math.prod(shape[1:])) if field == "o" else (math.prod(shape[:-1]), shape[-1])
    return NAMES[field][layout.column].format(*layer) + ".weight", shape


def all_tensors(layout: Layout, config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors of a model."""
    return dict(tensor(layout, path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(shapes(config)))


def as_array(name: str, array: Any) -> Array:
    """A jax array of a tensor. Without the dtype it would be made by a program for each shape."""
    return jnp.asarray(array, array.dtype)


def from_named(
    layout: Layout, get: Callable[[str], Any], config: Config, put: Callable[[str, Any], Array] = as_array,
    each: Callable[..., Iterable[Array]] = map,
) -> Params:  # fmt: skip
    """Parameters from the tensors that `get` finds by name. Linear, so gradients can be converted the same way.

    `put` makes the jax array of each, from its name and from rows in our order; `each` is `map`, or that of threads.
    """

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        name, _ = tensor(layout, path, leaf.shape)
        array = get(name)
        if layout.half_split and path[-1].name in ("q", "k"):
            *heads, width, dim = leaf.shape
            array = array.reshape(*heads, 2, width // 2, dim).swapaxes(-3, -2)
        return put(name, array.reshape(leaf.shape))

    wanted, tree = jax.tree.flatten_with_path(shapes(config))
    return tree.unflatten(each(of, *zip(*wanted, strict=True)))


def copied(array: Any) -> Array:
    """A jax array of its own memory, from one of numpy, jax or torch."""
    if hasattr(array, "detach"):  # torch's, which has a bfloat16 that numpy cannot read
        array = jnp.from_dlpack(array.detach().cpu().contiguous())
    return jnp.array(array)


def from_arrays(layout: Layout, arrays: Mapping[str, Any], config: Config) -> Params:
    """`from_named` of a set of arrays that is checked against the config. They are copied.

    A tied model may come with its unembedding, as a state_dict of torch does, if it equals the embedding.
    """
    embed, unembed = (f"{NAMES[field][layout.column]}.weight" for field in ("embed", "unembed"))
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if config.tied and found.get(embed) == found.get(unembed, ()):
        same = arrays[embed] is arrays[unembed] or bool((copied(arrays[embed]) == copied(arrays[unembed])).all())
        check(unembed, "other values than the embedding's", same, "the same, as the config is tied", "arrays")
        del found[unembed]
    check_tensors(all_tensors(layout, config), found, "arrays")
    return from_named(layout, lambda name: copied(arrays[name]), config)


def to_named(layout: Layout, params: Params, config: Config) -> Callable[[str], Float[np.ndarray, "..."]]:
    """What gives each tensor by its name in a file, made when asked for: the inverse of `from_named`."""
    check_params(shapes_in_tuple(params, config), config)
    paths = {tensor(layout, path, leaf.shape)[0]: path for path, leaf in jax.tree.leaves_with_path(shapes(config))}
    wanted, stacked = all_tensors(layout, config), is_stacked(params)

    def get(name: str) -> Float[np.ndarray, "..."]:
        node: Any = params
        for key in paths[name]:
            if hasattr(key, "name"):
                node = getattr(node, key.name)
            elif not stacked:
                node = node[key.idx]
        layer = [key.idx for key in paths[name] if stacked and hasattr(key, "idx")]
        array = np.asarray(node[layer[0]] if layer else node)
        if layout.half_split and paths[name][-1].name in ("q", "k"):
            *heads, width, dim = array.shape
            array = array.reshape(*heads, width // 2, 2, dim).swapaxes(-3, -2)
        return array.reshape(wanted[name])

    return get


def to_arrays(layout: Layout, params: Params, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """The inverse of `from_arrays`."""
    get = to_named(layout, params, config)
    return {name: get(name) for name in all_tensors(layout, config)}


def rope_scaling(fields: Mapping[str, Any], file: object) -> RopeScaling | None:
    """A scaling as Hugging Face describes it, in older and newer files; unknown fields and kinds are refused."""
    fields = {name: value for name, value in fields.items() if value is not None}
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    kind = fields.get("rope_type", fields.get("type", "default"))
    check("rope_scaling.type", fields.get("type"), fields.get("type", kind) == kind, f"{kind}, as rope_type is", file)
    own = {"llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": {"beta_fast", "beta_slow", "attention_factor"}}
    check("rope_scaling.rope_type", kind, kind in ("default", "linear", *own), "default, linear, llama3 or yarn", file)
    unknown = sorted(set(fields) - known - own.get(kind, set()))
    check("rope_scaling", ", ".join(unknown), not unknown, f"only fields that are known for {kind}", file)
    if kind == "default":
        return None

    def number(name: str, *default: float | int) -> float | int:
        value = fields.get(name, *default)
        check(f"rope_scaling.{name}", value, is_number(value), "a number", file)
        return value

    factor = number("factor")
    check("rope_scaling.factor", factor, factor > 0, "a number above 0", file)
    if kind == "linear":
        return RopeScaling(kind, factor)
    ctx = number("original_max_position_embeddings")
    check("rope_scaling.original_max_position_embeddings", ctx, is_whole(ctx), "a whole number", file)
    if kind == "llama3":
        return RopeScaling(kind, factor, int(ctx), number("low_freq_factor"), number("high_freq_factor"))
    attention_factor = number("attention_factor", 0.1 * math.log(factor) + 1)  # arXiv:2309.00071, eq. (22)
    return RopeScaling(kind, factor, int(ctx), number("beta_slow", 1), number("beta_fast", 32), attention_factor)
