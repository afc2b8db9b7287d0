"""Keys and values are rounded to float16, in one pass too.

Attention reads them from the cache, which is of float16 whatever the weights are in (HALF=0 leaves these as the file
has them), so 11 significant bits are left of each key and value, where the rest is computed in float32. The
checkpoint's owner keeps them in the type that the model computes in. It matters for every checkpoint that is held
against float32 (a cache of bfloat16 would round more), and a key or value of size 65520 or more would become infinite.
"""

from types import SimpleNamespace
from typing import Any

import run_tinygrad  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tinygrad import Tensor, dtypes
from tinygrad.llm import model

KIND = "Deliberate difference"
WHERE = "tinygrad/llm/model.py:184"
SHOWS = ("plain", "head_dim", "tied", "llama3", "linear", "yarn")
CURE = "a cache of float32"
SEEN = "tinygrad/tinygrad#17690"


def cure() -> None:
    model.dtypes = SimpleNamespace(half=dtypes.float32)


if __name__ == "__main__":
    config: Any = model.TransformerConfig(1, 2, 2, 1, 1, 0.0, 2, 2, 1e4, 2, 2, 2)
    block = model.TransformerBlock(config)
    x = Tensor([[[1.0001, 0.0]]])
    block._init_state(x)
    for linear in (block.attn_q, block.attn_k, block.attn_v, block.attn_output):
        linear.weight = Tensor.eye(2)
    print(f"tinygrad's attention to a single value: {block._attention(x, 0)[0, 0, 0].item():.6f}")
    print(f"that value: {x[0, 0, 0].item():.6f}")
