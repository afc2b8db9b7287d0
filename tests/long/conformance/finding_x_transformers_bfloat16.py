"""In bfloat16 the rotation's frequencies and positions are bfloat16 too.

The inverse frequencies are a buffer, which `model.to(torch.bfloat16)` rounds to 8 significant bits; the positions take
its dtype (`t.type_as(self.inv_freq)`), in which 257 is 256 and 299 is 300; so do the angles, which are rounded by up to
half a radian between 128 and 256. transformers, which Llamas are published for, always multiplies positions and
frequencies in float32, and a model that `from_pretrained` loads in bfloat16 keeps its frequencies in float32 as well.
It matters for every model that is cast as a whole, and more so the longer its context; under autocast all stays in
float32.
"""

from typing import Any

import torch
from x_transformers.x_transformers import RotaryEmbedding

KIND = "Fault"
WHERE = "x_transformers/x_transformers.py:879"
SHOWS = ("bfloat16",)
CURE = "keep frequencies and positions in float32"
SEEN = "lucidrains/x-transformers#210, closed, which reports the like under mixed precision"


def cure() -> None:
    apply = RotaryEmbedding._apply

    def kept(self: Any, function: Any, *arguments: Any) -> Any:
        exact = self.inv_freq
        apply(self, function, *arguments)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self

    RotaryEmbedding._apply = kept


if __name__ == "__main__":
    rotary, position = RotaryEmbedding(16), torch.tensor([299])
    exact = rotary(position)[0][0, 0, ::2]
    rounded = rotary.to(torch.bfloat16)(position)[0][0, 0, ::2]
    print(f"angles at 299, x-transformers in bfloat16: {rounded.tolist()}")
    print(f"angles at 299, in float32:                 {exact.tolist()}")
