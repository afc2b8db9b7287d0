"""How other programs name and arrange what we have: parameters and rotary scalings."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from lovely_llama import Config, Params, RopeScaling, check, shapes


class Layout(NamedTuple):
    """How one family of formats arranges parameters."""

    column: int  # in NAMES
    half_split: bool  # in q and k, a head's rows hold the first members of all rotary pairs, then the second ones


LLAMA2C, GGUF, HUGGING_FACE = Layout(0, False), Layout(1, False), Layout(2, True)

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
    """A parameter's name and shape in a file: a gain is a vector there, everything else a matrix [out, in]."""
    layer, field = [key.idx for key in path if hasattr(key, "idx")], path[-1].name
    if len(shape) > 1:
        shape = (shape[0], math.prod(shape[1:])) if field == "o" else (math.prod(shape[:-1]), shape[-1])
    return NAMES[field][layout.column].format(*layer) + ".weight", shape


def all_tensors(layout: Layout, config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all tensors of a model."""
    return dict(tensor(layout, path, leaf.shape) for path, leaf in jax.tree.leaves_with_path(shapes(config)))


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], file: object) -> None:
    """Refuse tensors other than those of the config: a missing one, an unexpected one, or another shape."""
    missing, extra = [n for n in expected if n not in found], [n for n in found if n not in expected]
    check("tensors", f"{len(missing)} missing ({', '.join(missing[:3])})", not missing, len(expected), file)
    check("tensors", f"{len(extra)} unexpected ({', '.join(extra[:3])})", not extra, len(expected), file)
    for name, shape in expected.items():
        check(name, found[name], found[name] == shape, shape, file)


def from_named(layout: Layout, get: Callable[[str], Any], config: Config) -> Params:
    """Parameters from the tensors that `get` finds by name. Linear, so gradients can be converted the same way."""

    def of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        name, _ = tensor(layout, path, leaf.shape)
        array = get(name)
        if layout.half_split and path[-1].name in ("q", "k"):
            *heads, width, dim = leaf.shape
            array = array.reshape(*heads, 2, width // 2, dim).swapaxes(-3, -2)
        return jnp.asarray(array.reshape(leaf.shape), array.dtype)  # without the dtype, by a program for each shape

    return jax.tree.map_with_path(of, shapes(config))


def to_named(layout: Layout, params: Params) -> dict[str, Float[np.ndarray, "..."]]:
    """The inverse of `from_named`, for blocks in a tuple."""

    def of(path: tuple[Any, ...], leaf: Array) -> tuple[str, Float[np.ndarray, "..."]]:
        name, shape = tensor(layout, path, leaf.shape)
        array = np.asarray(leaf)
        if layout.half_split and path[-1].name in ("q", "k"):
            *heads, width, dim = leaf.shape
            array = array.reshape(*heads, width // 2, 2, dim).swapaxes(-3, -2)
        return name, array.reshape(shape)

    return dict(of(path, leaf) for path, leaf in jax.tree.leaves_with_path(params))


def rope_scaling(fields: Mapping[str, Any], file: object) -> RopeScaling | None:
    """A scaling as Hugging Face describes it, in older and newer files; unknown fields and kinds are refused."""
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    kind = fields.get("rope_type", fields.get("type", "default"))
    own = {"llama3": {"low_freq_factor", "high_freq_factor"}, "yarn": {"beta_fast", "beta_slow", "attention_factor"}}
    check("rope_scaling.rope_type", kind, kind in ("default", "linear", *own), "default, linear, llama3 or yarn", file)
    unknown = sorted(set(fields) - known - own.get(kind, set()))
    check("rope_scaling", ", ".join(unknown), not unknown, f"only fields that are known for {kind}", file)
    if kind == "default":
        return None

    def number(name: str, *default: float | int) -> float | int:
        value = fields.get(name, *default)
        check(f"rope_scaling.{name}", value, type(value) in (int, float) and math.isfinite(value), "a number", file)
        return value

    factor = number("factor")
    check("rope_scaling.factor", factor, factor > 0, "a number above 0", file)
    if kind == "linear":
        return RopeScaling(kind, factor)
    ctx = number("original_max_position_embeddings")
    check("rope_scaling.original_max_position_embeddings", ctx, type(ctx) is int, "a whole number", file)
    if kind == "llama3":
        return RopeScaling(kind, factor, int(ctx), number("low_freq_factor"), number("high_freq_factor"))
    attention_factor = number("attention_factor", 0.1 * math.log(factor) + 1)  # arXiv:2309.00071, eq. (22)
    return RopeScaling(kind, factor, int(ctx), number("beta_slow", 1), number("beta_fast", 32), attention_factor)
