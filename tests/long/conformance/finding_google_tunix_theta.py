"""The base of the rotation is 1,000,000, whatever the config says.

ModelConfig has a field rope_theta, and all its ready configs state 500,000, but attention does not pass it on, and
apply_rope takes its default. The checkpoint's owner rotates with the base that config.json states. It matters for
every checkpoint that this module is for: Llama 3, 3.1 and 3.2, all of which state 500,000.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

from flax import nnx
from jax import numpy as jnp
from tunix.models.llama3 import model

KIND = "Fault"
WHERE = "tunix/models/llama3/model.py:352"
SHOWS = ("plain", "head_dim", "tied", "llama3")
CURE = "pass rope_theta=self.config.rope_theta to both calls of apply_rope"
SEEN = ""


def cure() -> None:
    block, rope = model.Attention.block, model.apply_rope

    def cured(self: Any, *inputs: Any) -> Any:
        model.apply_rope = partial(rope, rope_theta=self.config.rope_theta)
        return block(self, *inputs)

    model.Attention.block = cured


if __name__ == "__main__":
    config = replace(model.ModelConfig.llama3p1_8b(), embed_dim=128, num_heads=1, num_kv_heads=1)
    attention = model.Attention(config, rngs=nnx.Rngs(0))
    attention.k_proj.w.value = jnp.eye(128)[:, None]
    empty = jnp.zeros((1, 1, 1, 128))
    cache = {"k": empty, "v": empty, "end_index": jnp.zeros(1, jnp.int32)}
    key = attention(jnp.eye(128)[None, 32:33], jnp.array([[1000]]), cache, None)[0]["k"][0, 0, 0]
    print(f"tunix's llama3p1_8b turns the middle pair of a key at 1000 by {math.atan2(key[96], key[32]):.3f}")
    print(f"Llama 3.1 8B, of base {config.rope_theta:,}, by {1000 / math.sqrt(config.rope_theta):.3f} before scaling")
