"""What other programs call the intermediates of a run, and how they arrange them."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lovely_llama import Config

HEADS = ("q", "q_rotated", "k", "k_rotated", "v", "heads")  # heads, tokens, features
MAPS = ("scores", "weights")  # heads, tokens, tokens


class Naming(NamedTuple):
    """How one program names what `trace` finds, with the layer's number in place of {}, and arranges it.

    Heads stand in one axis, after the tokens. What a program has no name for is not in its table.
    """

    names: Mapping[str, str]
    half_split: bool  # the rows of q and k, as in `formats.layout`
    flat: tuple[str, ...]  # where heads and features are one axis


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
    }, half_split=True, flat=HEADS),
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
