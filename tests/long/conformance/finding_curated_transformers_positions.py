"""In bfloat16 and float16, angles are rounded in prompts longer than 512.

The rotary frequencies are a buffer, which is cast with the weights. When a prompt exceeds the 512 positions that were
tabulated in float32, the whole table is made anew from the cast frequencies, and positions times frequencies are
rounded as well: from position 2048 on to multiples of 16 in bfloat16 and of 2 in float16, where the fastest pair turns
by one radian a position. It matters for every Llama in half precision beyond 512 tokens, such as
meta-llama/Llama-2-7b-hf (float16). The prompts of this page are too short to show it: on the plain checkpoint, 1000
random ids in bfloat16 are about half off past position 512 and a quarter before it, and 2% with the cure.
"""

import math
from typing import Any

import torch
from curated_transformers.layers.embeddings import RotaryEmbeddings

KIND = "Fault"
WHERE = "curated_transformers/layers/embeddings.py:128"
SHOWS = ()
CURE = "keep the frequencies in float32, cast the table"
SEEN = ""


def cure() -> None:
    """Cast all buffers but the frequencies, and tables that are made later."""
    cast, create = RotaryEmbeddings._apply, RotaryEmbeddings._create_rotary_embed

    def casts(self: Any, function: Any, recurse: bool = True) -> Any:
        theta = self.theta
        cast(self, function, recurse)
        self.theta = theta.to(self.theta.device)
        return self

    def creates(self: Any, *, width: int, length: int) -> None:
        dtype = self.cos.dtype if hasattr(self, "cos") else None
        create(self, width=width, length=length)
        self.cos, self.sin = self.cos.to(dtype), self.sin.to(dtype)

    RotaryEmbeddings._apply, RotaryEmbeddings._create_rotary_embed = casts, creates


if __name__ == "__main__":
    for dtype in (torch.bfloat16, torch.float16):
        rotary = RotaryEmbeddings(128).to(dtype)
        rotary(torch.ones(1, 1, 4096, 128, dtype=dtype))
        print(f"cosine of the fastest pair at position 3001 of 4096, {dtype}:")
        print(f"curated-transformers: {rotary.cos[3001, 0]:+.4f}")
        print(f"cos(3001):            {math.cos(3001):+.4f}")
