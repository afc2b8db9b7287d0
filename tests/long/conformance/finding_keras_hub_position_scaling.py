"""rope_position_scaling_factor does nothing.

LlamaBackbone takes rope_position_scaling_factor, which reaches the class RotaryEmbedding as scaling_factor. That one
divides the frequencies by it, in `_get_inverse_freq`, which LlamaRotaryEmbedding overrides without doing so. The
converter of Hugging Face checkpoints sets no such factor, so that it shows on none of them; it matters for whoever
builds a Llama with linear scaling by hand, such as lmsys/vicuna-7b-v1.5-16k (factor 4).
"""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import numpy as np
from keras_hub.src.models.llama.llama_rotary_embedding import LlamaRotaryEmbedding

KIND = "Fault"
WHERE = "keras_hub/src/models/llama/llama_rotary_embedding.py:117"
SHOWS = ()
CURE = "divide the inverse frequencies by the factor"
SEEN = ""


def cure() -> None:
    original = LlamaRotaryEmbedding._get_inverse_freq

    def scaled(self: Any, rotary_dim: int) -> Any:
        return original(self, rotary_dim) / self.position_scaling_factor

    LlamaRotaryEmbedding._get_inverse_freq = scaled


if __name__ == "__main__":
    x = np.ones((1, 13, 1, 4), np.float32)
    plain, scaled = LlamaRotaryEmbedding(), LlamaRotaryEmbedding(position_scaling_factor=4.0)
    print(f"keras-hub at position 12, factor 4: {np.array(scaled(x))[0, 12, 0]}")
    print(f"linear scaling: that of position 3: {np.array(plain(x))[0, 3, 0]}")
    cure()
    print(f"with the cure:                      {np.array(scaled(x))[0, 12, 0]}")
