"""transformers: what the checkpoints are called by, and so the control."""

from pathlib import Path
from typing import Any

import torch
from serving import serve, torch_gradient
from transformers import LlamaForCausalLM

INSTALL = ()


def load(folder: Path, dtype: str) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids])).logits


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    rows, cache = list[Any](), None
    for token in ids:
        out = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0])
    return torch.cat(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids])).logits[0], ids, model.model.embed_tokens.weight)


if __name__ == "__main__":
    serve("transformers", load, logits, decode, gradient)
