"""RMSNorm has no eps.

RMSNorm divides x by its root mean square, √(mean(x²)), as the equation of the paper (Zhang and Sennrich 2019) has it;
its README describes the norm, without gains, as `l2norm(x) * sqrt(dim)`. A Llama divides by √(mean(x²) + rms_norm_eps).
No argument adds one. The two part where the mean square is not far above eps: in the first layers, whose inputs are
embeddings. It matters wherever the weights of a Llama are put into it, such as those of meta-llama/Llama-2-7b-hf and
meta-llama/Llama-3.1-8B, whose rms_norm_eps is 1e-05.
"""

from typing import Any

import torch
from x_transformers.x_transformers import RMSNorm

KIND = "Deliberate difference"
WHERE = "x_transformers/x_transformers.py:1091"
SHOWS = ("plain", "head_dim", "tied", "linear")
CURE = "add the checkpoint's eps to the mean square"
SEEN = ""
EPS = 3e-5


def cure() -> None:
    RMSNorm.forward = with_eps


def with_eps(self: Any, x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    unit = wide * (wide.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return unit.type_as(x) * (self.g + float(self.unit_offset))


if __name__ == "__main__":
    norm, x = RMSNorm(4, unit_offset=True), torch.tensor([0.004, -0.002, 0.001, 0.003])
    with torch.no_grad():
        print(f"x-transformers:        {norm(x).tolist()}")
        print(f"a Llama, eps {EPS}: {with_eps(norm, x).tolist()}")
