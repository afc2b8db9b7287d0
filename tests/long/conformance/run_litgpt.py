"""litgpt: its Llama converter, a Config by hand, and Fabric as in `litgpt generate`."""

from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from safetensors.torch import load_file
from serving import read_config, serve, torch_gradient

INSTALL = (
    "pip install --no-deps litgpt==0.5.13",
    "pip install lightning==2.6.6 jsonargparse[signatures]==4.41.0",
)
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true"}


def load(folder: Path, dtype: str) -> Any:
    config = config_of(read_config(folder, ("llama3", "linear", "yarn")))
    weights = dict[str, Any]()
    copy_weights_hf_llama(config, {}, weights, load_file(folder / "model.safetensors"))
    fabric = Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[dtype])
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    model = fabric.setup_module(model.eval())
    model.load_state_dict(weights)
    return model


def config_of(stated: dict[str, Any]) -> Any:
    rope = stated["rope"]
    names = {"original_max_position_embeddings": "original_max_seq_len"}
    kept = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", *names)
    adjustments = {names.get(name, name): rope[name] for name in kept if name in rope}
    if rope["rope_type"] == "yarn":
        adjustments["mscale"] = 1.0  # 0.1 ln(factor) + 1, which is usual
    return Config(
        block_size=stated["max_position_embeddings"], n_layer=stated["num_hidden_layers"], n_embd=stated["hidden_size"],
        vocab_size=stated["vocab_size"], padded_vocab_size=stated["vocab_size"], n_head=stated["num_attention_heads"],
        n_query_groups=stated["num_key_value_heads"], head_size=stated["head_dim"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=stated["rms_norm_eps"],
        mlp_class_name="LLaMAMLP", intermediate_size=stated["intermediate_size"], rope_base=rope["rope_theta"],
        rope_adjustments=adjustments or None,
    )  # fmt: skip


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]))


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    model.set_kv_cache(batch_size=1)
    at = range(len(ids))
    rows = [model(torch.tensor([[ids[i]]]), torch.tensor([i]), input_pos_maxp1=i + 1)[0] for i in at]
    return torch.cat(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids]))[0], ids, model.transformer.wte.weight)


if __name__ == "__main__":
    serve("litgpt", load, logits, decode, gradient)
