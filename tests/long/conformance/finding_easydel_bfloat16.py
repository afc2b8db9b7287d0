"""Cosines and sines are rounded to bfloat16, in a model of float32 too.

The table of the rotation is computed in float32 and cast to bfloat16, for memory as its documentation says, whatever
dtype and attn_dtype are: 8 significant bits are left of each cosine and sine. The checkpoint's owner rotates with
float32 ones. It matters for every checkpoint that is run in float32, and in short texts too: the error does not grow
with the position.
"""

from typing import Any

import jax
from easydel import LlamaConfig, layers
from easydel.infra.base_config import EasyDeLBaseConfig
from easydel.infra.utils import ModuleCaches
from jax import numpy as jnp

KIND = "Deliberate difference"
WHERE = "easydel/infra/base_config.py:2684"
SHOWS = ("plain", "head_dim", "tied", "llama3", "linear", "yarn")
CURE = "leave the table in float32"
SEEN = ""


def cure() -> None:
    def cured(self: Any) -> Any:
        table = layers.get_frequencies(
            head_size=self.head_dim, rotary_dim=self.head_dim, max_position=self.granted_freq_max_position_embedding,
            base=self.rope_theta, rope_scaling=self._get_rope_config().to_dict(),
        )  # fmt: skip
        return ModuleCaches(jax.device_put(table, jax.NamedSharding(self.mesh, jax.P())))

    EasyDeLBaseConfig.get_basic_frequencies = cured


if __name__ == "__main__":
    config = LlamaConfig(hidden_size=128, num_attention_heads=1, attn_dtype=jnp.float32)
    table = config.get_basic_frequencies().value
    print(f"easydel's cosine of 1 radian, in {table.dtype}: {float(table[1, 0]):.6f}")
    print(f"the checkpoint's owner's, in float32: {float(jnp.cos(1.0)):.6f}")
