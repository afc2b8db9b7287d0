"""Weights are read through float16, whatever dtype is asked for.

When it converts a checkpoint of transformers in the torch_load_mode that is its default ("full", though the method's
documentation says "streaming"), from_pretrained(dtype=float32, param_dtype=float32) has transformers load it in float16
unless torch_dtype is passed, and widens that: 11 significant bits are left, and values below 3e-8 become 0. "streaming"
and the checkpoint's owner keep all bits of it. It matters for checkpoints of float32, and little for those of bfloat16,
whose 8 bits fit unless a value is below 8e-6.
"""

import tempfile
from typing import Any

import easydel
import torch
from easydel.infra.mixins.bridge import EasyBridgeMixin
from jax import numpy as jnp
from transformers import LlamaConfig, LlamaForCausalLM

KIND = "Fault"
WHERE = "easydel/infra/mixins/bridge.py:2253"
SHOWS = ("plain", "head_dim", "tied", "llama3", "linear", "yarn")
CURE = "let torch_dtype default to what the checkpoint is in"
SEEN = ""


def cure() -> None:
    load = EasyBridgeMixin._load_full_torch_checkpoint

    def cured(*, kwargs: dict[str, Any], **named: Any) -> Any:
        return load(kwargs={"torch_dtype": "auto", **kwargs}, **named)

    EasyBridgeMixin._load_full_torch_checkpoint = cured


if __name__ == "__main__":
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs.model.norm.weight.fill_(1.0001)
        theirs.save_pretrained(folder)
        model = easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
            folder, from_torch=True, dtype=jnp.float32, param_dtype=jnp.float32
        )
    print(f"easydel's gain, in {model.model.norm.kernel.dtype}: {float(model.model.norm.kernel[0]):.6f}")
    print(f"the checkpoint's: {theirs.model.norm.weight[0].item():.6f}")
