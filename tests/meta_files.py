"""Folders as Meta distributes them, written by torch from random weights."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lovely_llama import Config
from lovely_llama_tools.formats.layout import LLAMA2C, all_tensors

META = Config(40, 32, 2, 4, 2, 4, 96, 2048, 1e-5, 1e4, None, False)
PARAMS = {
    "dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "vocab_size": -1, "multiple_of": 16, "norm_eps": 1e-5
}  # fmt: skip
BY_COLUMNS = ("attention.wo", "feed_forward.w2")  # row-parallel layers, as Meta's code calls them


def meta_weights(config: Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gains 1 ± ½, and matrices that preserve a vector's norm on average."""
    torch.manual_seed(seed)
    weights = dict[str, torch.Tensor]()
    for name, shape in all_tensors(LLAMA2C, config).items():
        drawn = torch.randn(shape)
        weights[name] = 1 + drawn / 2 if len(shape) == 1 else drawn / math.sqrt(shape[1])
    return weights


def split(name: str, weight: torch.Tensor, parts: int, style: str) -> tuple[torch.Tensor, ...]:
    """What each of Meta's devices holds."""
    if weight.ndim == 1:
        return (weight,) * parts
    columns = any(part in name for part in BY_COLUMNS) or (name.startswith("tok_") and style == "llama 2")
    return tuple(part.clone() for part in weight.chunk(parts, 1 if columns else 0))


def write_meta(
    folder: Path, weights: Mapping[str, torch.Tensor], parts: int = 1, style: str = "llama 2", **params: Any
) -> Path:
    """Write params.json, and one file for each part, with a table of frequencies as in Llama 1 and 2."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    pieces = {name: split(name, weight, parts, style) for name, weight in weights.items()}
    for i in range(parts):
        tensors = {name: pieces[name][i] for name in weights}
        torch.save(tensors | {"rope.freqs": torch.ones(2)}, folder / f"consolidated.{i:02}.pth")
    return folder
