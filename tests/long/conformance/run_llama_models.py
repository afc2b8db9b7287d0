"""llama-models: its `ModelArgs` by hand, weights by name, queries and keys put back into neighbouring pairs."""

from pathlib import Path
from typing import Any

import torch
from fairscale.nn.model_parallel.initialize import initialize_model_parallel, model_parallel_is_initialized
from llama_models.llama3.args import ModelArgs
from llama_models.llama3.model import Transformer
from safetensors.torch import load_file
from serving import read_config, serve

INSTALL = (
    "pip install llama-models==0.3.0",
    "pip install setuptools wheel",
    "pip install fairscale==0.4.13 --no-build-isolation --no-deps",
)
NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
}  # fmt: skip


def args_of(config: dict[str, Any]) -> Any:
    dim, heads, rope = config["hidden_size"], config["num_attention_heads"], config["rope"]
    return ModelArgs(
        dim=dim, n_layers=config["num_hidden_layers"], n_heads=heads, n_kv_heads=config["num_key_value_heads"],
        vocab_size=config["vocab_size"], norm_eps=config["rms_norm_eps"], rope_theta=rope["rope_theta"],
        use_scaled_rope=rope["rope_type"] == "llama3", max_seq_len=config["max_position_embeddings"], max_batch_size=1,
        multiple_of=1, ffn_dim_multiplier=(config["intermediate_size"] + 0.5) / (8 * dim // 3),
    )  # fmt: skip


def load(folder: Path, dtype: str) -> Any:
    if not model_parallel_is_initialized():
        store = Path("store").absolute().as_uri()
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        initialize_model_parallel(1)
    args = args_of(read_config(folder, ("llama3",), head_dim=False))
    weights = load_file(folder / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    state = dict[str, torch.Tensor]()
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.view(-1, 2, args.dim // args.n_heads // 2, args.dim).transpose(1, 2).flatten(0, 2)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = weight
    torch.set_default_dtype(getattr(torch, dtype))
    model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    model.load_state_dict(state)
    return model.eval()


def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]), 0)


def decode(model: Any, ids: list[int]) -> Any:
    return torch.cat([model(torch.tensor([[token]]), position)[0] for position, token in enumerate(ids)])


if __name__ == "__main__":
    serve("llama-models", load, logits, decode)
