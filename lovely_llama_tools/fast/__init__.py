"""The library's functions, computed sooner or in less memory: same arguments, same values, same gradients.

`llama`, `logits` and `loss` stand for the library's of the same names, and take layers stacked on an axis too. Others
use `layers` (one layer, a loop or a scan over them), `attention` (the fold over blocks of keys), `samplers` (selection
without a sort) and `objective` (the loss on a mesh, and over micro-batches). Each is tested equal to the library.
"""

from .layers import llama, logits
from .objective import accumulate, loss
from .samplers import choose

__all__ = ["accumulate", "choose", "llama", "logits", "loss"]
