"""The scaling of rotary frequencies is not read under transformers 5.

`reverse_rope_param_lookup` asks transformers 5's `rope_parameters` for a key `rope_scaling`, which is not in it: that
dict is flat, with `rope_type` and `factor` beside `rope_theta`. It gets None, in both spellings of config.json, and all
frequencies stay unscaled without a word. Given transformers 4's `rope_scaling`, the same function passes llama3 on, and
linear and yarn, which the package has no Llama for, end in a KeyError; with the cure they do so here too. It matters
for every scaled Llama, such as meta-llama/Llama-3.1-8B, whose slow pairs turn 8 times too fast, or
deepseek-ai/deepseek-coder-6.7b-base (linear).
"""

from typing import Any

import torch
from fms.models.hf.config_utils import param_builders
from fms.modules.positions import RotaryEmbedding
from transformers import LlamaConfig

KIND = "Fault"
WHERE = "fms/models/hf/config_utils/param_builders.py:29"
SHOWS = ("llama3", "linear", "yarn")
CURE = "take rope_parameters itself for the scaling, unless its type is default"
SEEN = ""

LLAMA_3_1 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def cure() -> None:
    def read(config: Any) -> tuple[float, dict[str, Any] | None]:
        rope = config.rope_parameters
        return rope["rope_theta"], None if rope["rope_type"] == "default" else rope

    param_builders.reverse_rope_param_lookup = read


if __name__ == "__main__":
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=LLAMA_3_1
    )
    config.architectures = ["LlamaForCausalLM"]
    read = param_builders.build_llama_params(config)
    rotary = RotaryEmbedding(128, ratio=read["rope_theta"], scaling=read.get("rope_scaling", {}))
    slowest = 5e5 ** (-126 / 128)
    print("the slowest pair of Llama 3.1 8B, radians per position")
    print(f"ibm-fms:               {rotary.rope_scaling.compute_scaled_freqs(torch.device('cpu'), 1)[-1]:.3e}")
    print(f"Meta, 8 times slower:  {slowest / 8:.3e}")
