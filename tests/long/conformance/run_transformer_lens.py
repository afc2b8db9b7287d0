"""transformer-lens: its `TransformerBridge` boots from the folder: transformers' model with an attention of its own."""

from pathlib import Path
from typing import Any

import torch
from serving import serve, torch_gradient
from transformer_lens.model_bridge import TransformerBridge

INSTALL = ("pip install transformer-lens==4.3.0",)


def load(folder: Path, dtype: str) -> Any:
    return TransformerBridge.boot_transformers(str(folder), dtype=getattr(torch, dtype), device="cpu").eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]))


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    rows, cache = list[Any](), None
    for token in ids:
        row, cache = model(
            torch.tensor([[token]]), return_type="logits_and_cache", past_key_values=cache, use_cache=True
        )
        rows.append(row[0])
    return torch.cat(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids]))[0], ids, model.embed.weight)


if __name__ == "__main__":
    serve("transformer-lens", load, logits, decode, gradient)
