"""The library's functions in another order, for running models: the same values and gradients, but for rounding.

`llama`, `logits` and `loss` stand for the library's of the same names, and take layers stacked on an axis too. Other
wings use `layers` (one layer, a loop or a scan over them), `attention` (a fold over blocks of keys), `samplers`
(selection without a sort) and `objective` (the loss on a mesh, and over micro-batches). Each is tested against the
library.
"""

from .layers import llama, logits
from .objective import accumulate, loss
from .samplers import choose

__all__ = ["accumulate", "choose", "llama", "logits", "loss"]
