"""llms-from-scratch: its load_weights_into_llama, a config by hand; its model with a cache is another one."""

from pathlib import Path
from typing import Any

import torch
from llms_from_scratch import llama3
from llms_from_scratch.kv_cache import llama3 as cached
from safetensors.torch import load_file
from serving import read_config, serve, torch_gradient

INSTALL = ("pip install --no-deps llms-from-scratch==1.0.19", "pip install tiktoken==0.14.0")


def load(folder: Path, dtype: str) -> Any:
    config = config_of(read_config(folder, ("llama3",), head_dim=False), getattr(torch, dtype))
    weights = {name: weight.to(config["dtype"]) for name, weight in load_file(folder / "model.safetensors").items()}
    models = llama3.Llama3Model(config), cached.Llama3Model(config)
    for model in models:
        llama3.load_weights_into_llama(model, config, weights)
        model.eval()
    return models


def config_of(stated: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    rope = stated["rope"]
    scaling = {name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor") if name in rope}
    if scaling:
        scaling["original_context_length"] = rope["original_max_position_embeddings"]
    return {
        "vocab_size": stated["vocab_size"], "context_length": stated["max_position_embeddings"],
        "emb_dim": stated["hidden_size"], "n_heads": stated["num_attention_heads"],
        "n_layers": stated["num_hidden_layers"], "hidden_dim": stated["intermediate_size"],
        "n_kv_groups": stated["num_key_value_heads"], "rope_base": rope["rope_theta"], "rope_freq": scaling or None,
        "dtype": dtype, "norm_eps": stated["rms_norm_eps"],  # which is not read
    }  # fmt: skip


@torch.no_grad()
def logits(models: Any, ids: list[int]) -> Any:
    return models[0](torch.tensor([ids]))


@torch.no_grad()
def decode(models: Any, ids: list[int]) -> Any:
    cache = cached.KVCache(n_layers=models[1].cfg["n_layers"])
    models[1].reset_kv_cache()
    return torch.cat([models[1](torch.tensor([[token]]), cache=cache)[0] for token in ids])


def gradient(models: Any, ids: list[int]) -> Any:
    return torch_gradient(models[0](torch.tensor([ids]))[0], ids, models[0].tok_emb.weight)


if __name__ == "__main__":
    serve("llms-from-scratch", load, logits, decode, gradient)
