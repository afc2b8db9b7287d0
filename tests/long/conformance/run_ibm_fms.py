"""ibm-fms: its `get_model` reads a Hugging Face folder, config.json and weights."""

from pathlib import Path
from typing import Any

import torch
from fms.models import get_model
from serving import serve, torch_gradient

INSTALL = ("pip install ibm-fms==1.13.1",)


def load(folder: Path, dtype: str) -> Any:
    return get_model("hf_pretrained", model_path=str(folder), data_type=getattr(torch, dtype)).eval()


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids]))


@torch.no_grad()
def decode(model: Any, ids: list[int]) -> Any:
    rows, cache = list[Any](), None
    for token in ids:
        row, cache = model(torch.tensor([[token]]), past_key_value_states=cache, use_cache=True)
        rows.append(row[0])
    return torch.cat(rows)


def gradient(model: Any, ids: list[int]) -> Any:
    return torch_gradient(model(torch.tensor([ids]))[0], ids, model.base_model.embedding.weight)


if __name__ == "__main__":
    serve("ibm-fms", load, logits, decode, gradient)
