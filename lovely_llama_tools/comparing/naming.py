"""What other programs call the intermediates of a run, and how they arrange them."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lovely_llama import Config

from .properties import plain
from .trace import IN_LAYERS, ONCE

HEADS = ("q", "q_rotated", "k", "k_rotated", "v", "heads")  # heads, tokens, features
MAPS = ("scores", "weights")  # heads, tokens, tokens

INPUT, LAST = ("input",), ("last",)  # of a layer, which is what the one before it gave; and what the last one gave


class Naming(NamedTuple):
    """How one program names what `trace` finds, with the layer's number in place of {}, and arranges it.

    Heads stand in one axis, after the tokens. What a program has no name for is not in its table.
    """

    names: Mapping[str, str]
    half_split: bool  # the rows of q and k, as in `formats.layout`
    flat: tuple[str, ...]  # where heads and features are one axis
    also: Mapping[str, tuple[str, ...]] = {}  # by their names: what else is one of ours, or several in one tensor


NAMINGS = {
    # Outputs of modules by their paths; ".input" is what a module is given; "attentions" what the model returns.
    "hf": Naming({
        "embed": "model.embed_tokens", "attn_norm": "model.layers.{}.input_layernorm",
        "q": "model.layers.{}.self_attn.q_proj", "k": "model.layers.{}.self_attn.k_proj",
        "v": "model.layers.{}.self_attn.v_proj", "weights": "attentions.{}",
        "heads": "model.layers.{}.self_attn.o_proj.input", "attn": "model.layers.{}.self_attn.o_proj",
        "ffn_norm": "model.layers.{}.post_attention_layernorm", "gate": "model.layers.{}.mlp.gate_proj",
        "up": "model.layers.{}.mlp.up_proj", "act": "model.layers.{}.mlp.down_proj.input",
        "ffn": "model.layers.{}.mlp.down_proj", "out": "model.layers.{}", "norm": "model.norm", "logits": "lm_head",
    }, half_split=True, flat=HEADS, also={
        "model.layers.{}.input": INPUT, "model.layers.{}.input_layernorm.input": INPUT, "model.norm.input": LAST,
        "model.layers.{}.self_attn.input": ("attn_norm",), "model.layers.{}.self_attn.q_proj.input": ("attn_norm",),
        "model.layers.{}.self_attn.k_proj.input": ("attn_norm",),
        "model.layers.{}.self_attn.v_proj.input": ("attn_norm",), "model.layers.{}.self_attn": ("attn",),
        "model.layers.{}.mlp.input": ("ffn_norm",), "model.layers.{}.mlp.gate_proj.input": ("ffn_norm",),
        "model.layers.{}.mlp.up_proj.input": ("ffn_norm",), "model.layers.{}.mlp": ("ffn",), "model": ("norm",),
        "lm_head.input": ("norm",),
    }),
    # The same with fused matrices, and norms that give their input too; vLLM's modules have these names as well.
    "sglang": Naming({
        "embed": "model.embed_tokens", "attn_norm": "model.layers.{}.input_layernorm",
        "q_rotated": "model.layers.{}.self_attn.rotary_emb.0", "k_rotated": "model.layers.{}.self_attn.rotary_emb.1",
        "heads": "model.layers.{}.self_attn.attn", "attn": "model.layers.{}.self_attn.o_proj",
        "ffn_norm": "model.layers.{}.post_attention_layernorm", "act": "model.layers.{}.mlp.act_fn",
        "ffn": "model.layers.{}.mlp.down_proj", "norm": "model.norm", "logits": "lm_head",
    }, half_split=True, flat=HEADS, also={
        "model.layers.{}.self_attn.qkv_proj": ("q", "k", "v"), "model.layers.{}.mlp.gate_up_proj": ("gate", "up"),
        "model.layers.{}.input_layernorm.1": INPUT, "model.norm.1": LAST,
    }),
    # Outputs of modules by their paths, in Meta's program too.
    "llama2.c": Naming({
        "embed": "tok_embeddings", "attn_norm": "layers.{}.attention_norm", "q": "layers.{}.attention.wq",
        "k": "layers.{}.attention.wk", "v": "layers.{}.attention.wv", "heads": "layers.{}.attention.wo.input",
        "attn": "layers.{}.attention.wo", "ffn_norm": "layers.{}.ffn_norm", "gate": "layers.{}.feed_forward.w1",
        "up": "layers.{}.feed_forward.w3", "act": "layers.{}.feed_forward.w2.input", "ffn": "layers.{}.feed_forward.w2",
        "out": "layers.{}", "norm": "norm", "logits": "output",
    }, half_split=False, flat=HEADS, also={
        "layers.{}.attention": ("attn",), "layers.{}.feed_forward": ("ffn",),
    }),
    # Nodes of the graph. Of Qcur and Kcur there are several, of which the last is rotated.
    "llama.cpp": Naming({
        "embed": "inp_embd", "attn_norm": "attn_norm-{}", "q_rotated": "Qcur-{}", "k_rotated": "Kcur-{}",
        "v": "Vcur-{}", "weights": "kq_soft_max-{}", "heads": "kqv_out-{}", "attn": "attn_out-{}",
        "ffn_norm": "ffn_norm-{}", "gate": "ffn_gate-{}", "up": "ffn_up-{}", "act": "ffn_swiglu-{}",
        "ffn": "ffn_out-{}", "out": "l_out-{}", "norm": "result_norm", "logits": "result_output",
    }, half_split=False, flat=("heads",)),
    # Hook points; of norms the modules, whose hooks stand before the gain.
    "transformer-lens": Naming({
        "embed": "hook_embed", "attn_norm": "blocks.{}.ln1", "q": "blocks.{}.attn.hook_q",
        "q_rotated": "blocks.{}.attn.hook_rot_q", "k": "blocks.{}.attn.hook_k",
        "k_rotated": "blocks.{}.attn.hook_rot_k", "v": "blocks.{}.attn.hook_v",
        "scores": "blocks.{}.attn.hook_attn_scores", "weights": "blocks.{}.attn.hook_pattern",
        "heads": "blocks.{}.attn.hook_z", "attn": "blocks.{}.hook_attn_out", "ffn_norm": "blocks.{}.ln2",
        "gate": "blocks.{}.mlp.hook_pre", "up": "blocks.{}.mlp.hook_pre_linear", "act": "blocks.{}.mlp.hook_post",
        "ffn": "blocks.{}.hook_mlp_out", "out": "blocks.{}.hook_resid_post", "norm": "ln_final", "logits": "unembed",
    }, half_split=True, flat=()),
}  # fmt: skip


def renamed(
    found: Mapping[str, Float[np.ndarray, "..."]], naming: Naming, config: Config
) -> dict[str, Float[np.ndarray, "..."]]:
    """What `trace` found, under another program's names and in its arrangement; what it has no name for is left out.

    Others scale cosines and sines by YaRN's factor, in queries and in keys; here the square of it scales the query."""
    factor, theirs = config.rope_scaling.attention_factor if config.rope_scaling else 1, dict[str, np.ndarray]()
    for name, array in found.items():
        prefix, _, last = name.rpartition(".")
        if last not in naming.names:
            continue
        if last in ("q_rotated", "k_rotated"):
            array = (array * np.float32(factor)).astype(array.dtype)
        if naming.half_split and last in ("q", "k", "q_rotated", "k_rotated"):
            array = np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)
        if last in HEADS + MAPS:
            array = array.reshape(-1, *array.shape[-2:])  # one axis of heads
        if last in HEADS:
            array = array.swapaxes(0, 1)
        if last in naming.flat:
            array = array.reshape(len(array), -1)
        theirs[naming.names[last].format(prefix.partition(".")[2])] = array
    return theirs


# ---- From other programs to here -------------------------------------------------------------------------------------

OURS = Naming({name: name if name in ONCE else f"layers.{{}}.{name}" for name in (*ONCE, *IN_LAYERS)}, False, ())


def pattern(name: str) -> re.Pattern[str]:
    """What matches a name, with anything in front of it, without "model.", or with the mark of an output behind it."""
    inner = re.escape(name.removeprefix("model.")).replace(r"\{\}", r"(\d+)")
    return re.compile(rf"(?:.*\.)?{inner}(?:\.output)?(?:\.0)?")


def recognised(
    arrays: Mapping[str, Any], config: Config, tokens: int
) -> tuple[dict[str, Float[np.ndarray, "..."]], list[str]]:
    """Others' arrays under `trace`'s names and in its arrangement, and what of them is not known or does not fit.

    The naming is the one that knows most of them."""
    matches = [(matched(arrays, naming, config.layers), naming) for naming in (OURS, *NAMINGS.values())]
    names, naming = max(matches, key=lambda match: len(match[0]))
    found = dict[str, np.ndarray]()
    unknown = [given for given in arrays if given not in names]
    for given, parts in names.items():
        placed = arranged(plain(arrays[given]), parts, naming, config, tokens)
        found |= {name: x for name, x in placed.items() if name not in found}
        unknown += [] if placed else [f"{given} of shape {np.shape(arrays[given])}"]
    return found, unknown


def matched(arrays: Mapping[str, Any], naming: Naming, layers: int) -> dict[str, tuple[str, ...]]:
    """What each of the given names stands for in a naming."""
    found = dict[str, tuple[str, ...]]()
    for name, ours in [*((name, (ours,)) for ours, name in naming.names.items()), *naming.also.items()]:
        for given in arrays:
            if (match := pattern(name).fullmatch(given)) and given not in found:
                layer = int(match[1]) if match.groups() else None
                found[given] = tuple(full_name(part, layer, layers) for part in ours)
    return found


def full_name(name: str, layer: int | None, layers: int) -> str:
    """One of our names with the layer's number."""
    if name in ("input", "last"):
        name, layer = ("out", layers - 1) if layer is None else ("out", layer - 1) if layer else ("embed", None)
    return name if layer is None else f"layers.{layer}.{name}"


def arranged(
    array: Float[np.ndarray, "..."], parts: tuple[str, ...], naming: Naming, config: Config, tokens: int
) -> dict[str, Float[np.ndarray, "..."]]:
    """An array in the arrangement of `trace`, cut into its parts; nothing if it does not fit."""
    heads = {"q": (config.kv_heads, config.q_per_kv), "heads": (config.kv_heads, config.q_per_kv)}
    wide = {"gate": config.hidden_dim, "up": config.hidden_dim, "act": config.hidden_dim, "logits": config.vocab}
    shapes = list[tuple[int, ...]]()
    for part in parts:
        last = part.rpartition(".")[2].removesuffix("_rotated")
        if last in MAPS:
            shapes.append((config.kv_heads, config.q_per_kv, tokens, tokens))
        elif last in HEADS:
            shapes.append((*heads.get(last, (config.kv_heads,)), tokens, config.head_dim))
        else:
            shapes.append((tokens, wide.get(last, config.dim)))
    layer = parts[0].split(".")[1] if "." in parts[0] else "0"
    if int(layer) >= config.layers or array.size != sum(map(np.prod, shapes)):
        return {}
    rows = array.reshape(tokens, -1) if len(parts) > 1 else array
    found, start = dict[str, np.ndarray](), 0
    for part, shape in zip(parts, shapes, strict=True):
        last, width = part.rpartition(".")[2], int(np.prod(shape)) // tokens
        x = rows if len(parts) == 1 else rows[:, start : (start := start + width)]
        if last in HEADS:
            count = int(np.prod(shape[:-2]))
            ahead = x.ndim > 2 and x.shape[-3:-1] == (count, tokens) and (count != tokens or last.endswith("_rotated"))
            if not (ahead or naming is OURS):
                x = x.reshape(tokens, count, -1).swapaxes(0, 1)  # tokens come first
        x = x.reshape(shape)
        if naming.half_split and last in ("q", "k", "q_rotated", "k_rotated"):
            x = np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(shape)
        if naming is not OURS and last in ("q_rotated", "k_rotated"):
            x = x / (config.rope_scaling.attention_factor if config.rope_scaling else 1)
        found[part] = x
    return found
