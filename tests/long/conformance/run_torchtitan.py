"""torchtitan: its Llama 3 config by hand, weights by its `Llama3StateDictAdapter`, its SDPA for flex attention."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from serving import read_config, serve, torch_gradient
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

INSTALL = ("pip install torchtitan==0.3.0", "pip install triton --no-deps")


def rope_of(config: dict[str, Any]) -> Any:
    rope, more = config["rope"], dict[str, Any]()
    kind = rope["rope_type"]
    if kind == "llama3":
        fields = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        more = {"scaling": "llama", "scaling_factor": rope["factor"], **{name: rope[name] for name in fields}}
    elif kind == "yarn":
        more = {
            "scaling": "yarn", "rope_factor": rope["factor"], "beta_fast": rope.get("beta_fast", 32.0),
            "beta_slow": rope.get("beta_slow", 1.0), "original_seq_len": rope["original_max_position_embeddings"],
        }  # fmt: skip
    return ComplexRoPE.Config(
        dim=config["head_dim"], max_seq_len=config["max_position_embeddings"], theta=rope["rope_theta"], **more
    )


def config_of(config: dict[str, Any]) -> Any:
    dim, vocab = config["hidden_size"], config["vocab_size"]
    norm = RMSNorm.Config(normalized_shape=dim, eps=config["rms_norm_eps"])
    attention = make_gqa_config(
        dim=dim, n_heads=config["num_attention_heads"], n_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"], fuse_qkv=True, rope=rope_of(config), wqkv_param_init={}, wo_param_init={},
        inner_attention=ScaledDotProductAttention.Config(),
    )  # fmt: skip
    ffn = make_ffn_config(dim=dim, hidden_dim=config["intermediate_size"], w1_param_init={}, w2w3_param_init={})
    layer = Llama3TransformerBlock.Config(attention_norm=norm, ffn_norm=norm, attention=attention, feed_forward=ffn)
    return Llama3Model.Config(
        dim=dim, vocab_size=vocab, norm=norm, layers=[layer] * config["num_hidden_layers"],
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim),
        lm_head=Linear.Config(in_features=dim, out_features=vocab), enable_weight_tying=config["tie_word_embeddings"],
    )  # fmt: skip


def load(folder: Path, dtype: str) -> Any:
    config = config_of(read_config(folder, ("llama3", "yarn")))
    torch.set_default_dtype(getattr(torch, dtype))
    model = config.build()
    torch.set_default_dtype(torch.float32)
    model.load_state_dict(Llama3StateDictAdapter(config, None).from_hf(load_file(folder / "model.safetensors")))
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]))


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids]))[0], ids, model.tok_embeddings.weight)


if __name__ == "__main__":
    serve("torchtitan", load, logits, gradient=gradient)
