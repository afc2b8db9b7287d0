"""penzai: llama_from_huggingface_model, which checks the config, less two fields that every loaded one has."""

from pathlib import Path
from typing import Any

import torch
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.variants.llama import llama_from_huggingface_model
from serving import serve
from transformers import LlamaForCausalLM

INSTALL = ("pip install penzai==0.2.5 transformers==4.57.6",)


def load(folder: Path, dtype: str) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.config.update({"_name_or_path": "", "dtype": None})
    return llama_from_huggingface_model(model)


def logits(model: Any, ids: list[int]) -> Any:
    return rows(model(pz.nx.wrap(ids).tag("seq")))


def decode(model: Any, ids: list[int]) -> Any:
    """The cache leaves out the token that pads: none here."""
    cached = KVCachingTransformerLM.from_uncached(model, cache_len=len(ids), batch_axes={}, pad_id=-1)
    return [rows(cached(pz.nx.wrap([token]).tag("seq")))[0] for token in ids]


def rows(named: Any) -> Any:
    return named.unwrap("seq", "vocabulary")


if __name__ == "__main__":
    serve("penzai", load, logits, decode)
