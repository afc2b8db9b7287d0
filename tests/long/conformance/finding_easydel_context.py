"""With Llama 3.1's scaling, the table of the rotation ends at the original context.

It has original_max_position_embeddings rows in place of max_position_embeddings, and positions beyond it read its last
row: all of them count as the same place. The checkpoint's owner goes on to 131,072 positions, which the scaling is
made for. It matters for Llama 3.1, which the package's README loads, 3.2 and 3.3, past 8192 tokens.
"""

from typing import Any

from easydel import LlamaConfig, layers
from jax import numpy as jnp

KIND = "Fault"
WHERE = "easydel/layers/rotary/_rotary.py:330"
SHOWS = ("llama3",)
CURE = "compute the table for max_position rows, as is done without a scaling"
SEEN = ""


def cure() -> None:
    short = layers.get_frequencies

    def cured(*, rope_scaling: Any, max_position: int, **named: Any) -> Any:
        if rope_scaling["rope_type"] != "llama3":
            return short(rope_scaling=rope_scaling, max_position=max_position, **named)
        rates = layers.get_inv_frequencies(rope_scaling=rope_scaling, max_position=max_position, **named)
        angles = jnp.outer(jnp.arange(max_position), rates)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)

    layers.get_frequencies = cured


if __name__ == "__main__":
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, max_position_embeddings=131072, rope_theta=5e5, rope_scaling=scaling
    )
    print(f"easydel's table for Llama 3.1's config has {len(config.get_basic_frequencies().value)} rows")
    print(f"the config's max_position_embeddings: {config.max_position_embeddings}")
