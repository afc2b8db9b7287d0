"""x-transformers: config and weights by hand; its heads share keys and values in turn, its pairs are neighbours."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from serving import read_config, serve, torch_gradient
from x_transformers import Decoder, TransformerWrapper

INSTALL = ("pip install x-transformers==2.31.10",)


def load(folder: Path, dtype: str) -> Any:
    config = read_config(folder, ("linear",))
    rope = config["rope"]
    dim, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    decoder = Decoder(
        dim=dim, depth=config["num_hidden_layers"], heads=heads, attn_kv_heads=kv_heads, attn_dim_head=head_dim,
        ff_mult=(config["intermediate_size"] + 0.5) / dim, ff_glu=True, ff_swish=True, ff_no_bias=True,
        use_rmsnorm=True, rotary_pos_emb=True, rotary_emb_dim=head_dim,
        rotary_interpolation_factor=rope.get("factor", 1.0),
        rotary_base_rescale_factor=(rope["rope_theta"] / 1e4) ** ((head_dim - 2) / head_dim),
    )  # fmt: skip
    model = TransformerWrapper(
        num_tokens=config["vocab_size"], max_seq_len=config["max_position_embeddings"], attn_layers=decoder,
        tie_embedding=config["tie_word_embeddings"], tie_embedding_scale=1.0,
    )  # fmt: skip
    kind = getattr(torch, dtype)
    weights = {name: w.to(kind) for name, w in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(model.state_dict() | renamed(weights, kv_heads, head_dim))
    return model.eval().to(kind)


def renamed(weights: dict[str, Any], kv_heads: int, head_dim: int) -> dict[str, Any]:
    def pairs(w: Any) -> Any:
        return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def tiled(w: Any) -> Any:
        return w.unflatten(0, (kv_heads, -1, head_dim)).transpose(0, 1).flatten(0, 2)

    found = {
        "token_emb.emb.weight": weights["model.embed_tokens.weight"],
        "attn_layers.final_norm.g": weights["model.norm.weight"] - 1,
    }
    if "lm_head.weight" in weights:
        found["to_logits.weight"] = weights["lm_head.weight"]
    for layer in range(sum(name.endswith("q_proj.weight") for name in weights)):
        theirs = f"model.layers.{layer}."
        attention, ff = f"attn_layers.layers.{2 * layer}.", f"attn_layers.layers.{2 * layer + 1}."
        q, k, v, o = (weights[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (weights[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        found |= {
            f"{attention}0.0.g": weights[f"{theirs}input_layernorm.weight"] - 1,
            f"{attention}1.to_q.weight": tiled(pairs(q)),
            f"{attention}1.to_k.weight": pairs(k),
            f"{attention}1.to_v.weight": v,
            f"{attention}1.to_out.weight": tiled(o.T).T,
            f"{ff}0.0.g": weights[f"{theirs}post_attention_layernorm.weight"] - 1,
            f"{ff}1.ff.0.proj.weight": torch.cat([up, gate]),
            f"{ff}1.ff.0.proj.bias": torch.zeros(2 * len(up)),
            f"{ff}1.ff.2.weight": down,
        }
    return found


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]))


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    rows, cache = list[Any](), None
    for count in range(1, len(ids) + 1):
        out, cache = model(torch.tensor([ids[:count]]), cache=cache, return_intermediates=True)
        rows.append(out[0, -1])
    return torch.stack(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids]))[0], ids, model.token_emb.emb.weight)


if __name__ == "__main__":
    serve("x-transformers", load, logits, decode, gradient)
