"""Llama 3.1's scaling of the rotation is left out.

ModelConfig has ready configs of Llama 3.1 and 3.2 but no field for their rope_scaling, and the rotation is unscaled.
The checkpoint's owner turns pairs that make less than one full turn in 8192 positions 8 times more slowly (32 times in
Llama 3.2 1B and 3B), and those that make one to four turns by something in between. It matters for all of these
checkpoints, and the more the farther apart two tokens are.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx
from jax import numpy as jnp
from tunix.models.llama3 import model, params

KIND = "Fault"
WHERE = "tunix/models/llama3/model.py:253"
SHOWS = ("llama3",)
CURE = "read rope_scaling from config.json, and slow the frequencies by it"
SEEN = ""


def cure() -> None:
    create, scaling = params.create_model_from_safe_tensors, dict[str, Any]()

    def cured(folder: str, *options: Any, **named: Any) -> Any:
        stated = json.loads((Path(folder) / "config.json").read_text())
        scaling.clear()
        scaling.update(stated.get("rope_parameters") or stated["rope_scaling"] or {})
        return create(folder, *options, **named)

    def scaled(inputs: Any, positions: Any, head_dim: int, rope_theta: float = 1e6) -> Any:
        periods = rope_theta ** (jnp.arange(0, head_dim, 2) / head_dim)
        if scaling.get("rope_type") == "llama3":
            turns = scaling["original_max_position_embeddings"] / (2 * math.pi * periods)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            kept = jnp.clip((turns - low) / (high - low), 0, 1)
            periods /= kept + (1 - kept) / scaling["factor"]
        angles = (positions[..., None] / periods)[..., None, :]
        first, second = inputs[..., : head_dim // 2], inputs[..., head_dim // 2 :]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(inputs.dtype)

    params.create_model_from_safe_tensors, model.apply_rope = cured, scaled


if __name__ == "__main__":
    config = replace(model.ModelConfig.llama3p1_8b(), embed_dim=128, num_heads=1, num_kv_heads=1)
    attention = model.Attention(config, rngs=nnx.Rngs(0))
    attention.k_proj.w.value = jnp.eye(128)[:, None]
    empty = jnp.zeros((1, 1, 1, 128))
    cache = {"k": empty, "v": empty, "end_index": jnp.zeros(1, jnp.int32)}
    key = attention(jnp.eye(128)[None, 63:64], jnp.array([[100_000]]), cache, None)[0]["k"][0, 0, 0]
    print(f"tunix's llama3p1_8b turns the last pair of a key at 100,000 by {math.atan2(key[127], key[63]):.4f}")
    for base in (1e6, config.rope_theta):
        turn = 100_000 / base ** (126 / 128)
        print(f"base {base:,.0f}: by {turn:.4f} without a scaling, {turn / 8:.4f} with Llama 3.1 8B's factor of 8")
