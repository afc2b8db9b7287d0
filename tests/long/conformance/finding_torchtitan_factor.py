"""The configs 1B and 3B are scaled by Llama 3.1's factor.

All of `llama3_configs` say `scaling="llama"` and leave `scaling_factor` at its default, 8. The sizes of 1B and 3B, and
their tied weights, are those of meta-llama/Llama-3.2-1B and meta-llama/Llama-3.2-3B, after which they were proposed
(pytorch/torchtitan#1376); its README names only the 8B, 70B and 405B of Llama 3.1. Those two state a factor of 32 in
config.json: fed with their weights, the slow pairs turn 4 times too fast. The table is computed by a config by hand,
which states the checkpoint's factor.
"""

from torchtitan.models.llama3 import llama3_configs

KIND = "Limit"
WHERE = "torchtitan/models/llama3/__init__.py:184"
SHOWS = ()
SEEN = ""


if __name__ == "__main__":
    rope = llama3_configs["1B"](attn_backend="flex").layers[0].attention.rope
    slowest = rope.build().cache[1, -1].angle()
    print("the slowest pair of Llama 3.2 1B (theta 500000, head_dim 64), radians per position")
    print(f"torchtitan:             {slowest:.3e}")
    print(f"config.json, factor 32: {5e5 ** (-62 / 64) / 32:.3e}")
