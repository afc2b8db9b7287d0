"""curated-transformers: from_hf_config, with torch_dtype stated (it takes float16 where it finds only dtype)."""

import json
from pathlib import Path
from typing import Any

import torch
from curated_transformers.layers import AttentionMask
from curated_transformers.models.llama import LlamaCausalLM
from safetensors.torch import load_file
from serving import serve

INSTALL = ("pip install curated-transformers==2.0.1",)


def load(folder: Path, dtype: str) -> Any:
    config = json.loads((folder / "config.json").read_text())
    model = LlamaCausalLM.from_hf_config(hf_config=config | {"torch_dtype": dtype})
    model.to(dtype=getattr(torch, dtype))  # as from_repo does
    model.load_state_dict(LlamaCausalLM.state_dict_from_hf(load_file(folder / "model.safetensors")))
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]), mask(len(ids))).logits


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    rows, cache = list[Any](), None
    for i, token in enumerate(ids):
        out = model(torch.tensor([[token]]), mask(i + 1), cache=cache, store_cache=True)
        cache = out.cache
        rows.append(out.logits[0])
    return torch.cat(rows)


def mask(length: int) -> Any:
    return AttentionMask(torch.ones(1, length, dtype=torch.bool))


if __name__ == "__main__":
    serve("curated-transformers", load, logits, decode)
