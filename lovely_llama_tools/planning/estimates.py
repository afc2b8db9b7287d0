"""What a step must compute, hold and move at least, by formulas; and how long that takes at a data sheet's rates.

One device's share of a step on a mesh. Nothing here is measured, and what a layer moves within itself is left out.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from lovely_llama import Config, count

from ..devices.mesh import AXES
from .chips import Slice


class Task(NamedTuple):
    """A step: training on `batch` rows of `seq` tokens, or decoding a token for each row, with `seq` in its cache."""

    config: Config
    batch: int
    seq: int
    decode: bool
    dtype: str
    remat: str

    @property
    def tokens(self) -> int:
        """Tokens that a step brings."""
        return self.batch * (1 if self.decode else self.seq)

    @property
    def width(self) -> int:
        """Bytes of a number in the arithmetic."""
        return 4 if self.dtype == "float32" else 2

    @property
    def passes(self) -> int:
        """How often a step reads the weights: forwards, again where a layer keeps only its input, and backwards."""
        return 1 if self.decode else 3 if self.remat == "nothing" else 2


def in_products(config: Config) -> int:
    """Parameters that stand in products: all but the gains, and but an embedding that only looks up."""
    gains = (2 * config.layers + 1) * config.dim
    return count(config) - gains - (0 if config.tied else config.vocab * config.dim)


def model_flops(task: Task) -> float:
    """Floating-point operations that the model requires for a step, whatever is computed twice.

        (6N + 12 L H Q T) for each token in training, a third of it in decoding

    Chowdhery et al. 2022, arXiv:2204.02311, appendix B, with N parameters in products, L layers of H heads of width Q,
    and T tokens. Keys after a query are counted too, as there."""
    config, heads = task.config, task.config.kv_heads * task.config.q_per_kv
    each = 6 * in_products(config) + 12 * config.layers * heads * config.head_dim * task.seq
    return task.tokens * each / (3 if task.decode else 1)


def computed_flops(task: Task) -> float:
    """The same with what is computed again for the derivative: attention once and a half, as a layer repeats it and its
    loop over blocks repeats the scores; and unless they are kept, a layer's products but the last, which only adds."""
    if task.decode:
        return model_flops(task)
    config, heads = task.config, task.config.kv_heads * task.config.q_per_kv
    attention = 4 * config.layers * heads * config.head_dim * task.seq
    again = in_products(config) - config.dim * (config.vocab + config.layers * config.hidden_dim)
    return model_flops(task) + task.tokens * (1.5 * attention + (2 * again if task.remat == "nothing" else 0))


class Share(NamedTuple):
    """What of a model and a batch falls to one device of a mesh."""

    task: Task
    mesh: Mapping[str, int]

    def by(self, *axes: str) -> int:
        return math.prod(self.mesh.get(axis, 1) for axis in axes)

    @property
    def weights(self) -> float:
        """Parameters."""
        return count(self.task.config) / self.by("fsdp", "tensor")

    @property
    def tokens(self) -> float:
        return self.task.tokens / self.by("data", "fsdp", "seq")

    @property
    def cache(self) -> float:
        """Bytes of keys and values."""
        config, task = self.task.config, self.task
        heads = max(config.kv_heads / self.by("tensor"), 1)
        rows = task.batch / self.by("data", "fsdp")
        return 2 * config.layers * rows * heads * config.head_dim * task.seq * task.width

    @property
    def kept(self) -> float:
        """Bytes of what the layers keep for the derivative: their inputs, or their products with weights too."""
        config, tensor = self.task.config, self.by("tensor")
        heads = config.kv_heads * config.q_per_kv + 2 * config.kv_heads
        products = 2 * config.dim + (heads * config.head_dim + 2 * config.hidden_dim) / tensor
        each = config.dim + (products if self.task.remat == "dots" else 0)
        return self.tokens * config.layers * each * self.task.width

    @property
    def logits(self) -> float:
        """Bytes of the logits, in float32."""
        return 4 * self.tokens * self.task.config.vocab / self.by("tensor")

    @property
    def held(self) -> float:
        """Bytes that are in memory at once, roughly."""
        layer = count(self.task.config) / self.task.config.layers / self.by("tensor") * self.task.width
        if self.task.decode:
            return self.weights * self.task.width + self.cache + 2 * layer * (self.by("fsdp") > 1)
        return 20 * self.weights + self.kept + 2 * self.logits + 4 * layer

    @property
    def moved(self) -> float:
        """Bytes that memory must move: weights, what is kept for the derivative, the cache, and what AdamW updates."""
        task = self.task
        gathered = count(task.config) / self.by("tensor") * task.width
        reads = task.passes * gathered * (2 if self.by("fsdp") > 1 else 1)  # what is gathered is written first
        if task.decode:
            return reads + self.cache
        return reads + 2 * self.kept + 4 * self.logits + 8 * 4 * self.weights

    @property
    def sent(self) -> float:
        """Bytes that a device sends: gathered weights, gradients, and the sums of products that are split."""
        task, config = self.task, self.task.config
        data, fsdp, tensor = (self.by(axis) for axis in AXES[:3])
        whole = count(config) / tensor * task.width
        sums = 2 * task.passes * config.layers * self.tokens * config.dim * task.width * 2 * (tensor - 1) / tensor
        gathered = task.passes * whole * (fsdp - 1) / fsdp
        if task.decode:
            return sums + gathered
        gradients = whole * (fsdp - 1) / fsdp + 2 * 4 * self.weights * (data - 1) / data
        rows = task.batch / self.by("data", "fsdp") * task.seq  # keys and values of whole rows
        keys = 2 * config.kv_heads * config.head_dim / tensor * rows * config.layers * task.passes * task.width
        return sums + gathered + gradients + keys * (self.by("seq") - 1) / self.by("seq")


def seconds(part: Slice, flops: float, moved: float, sent: Mapping[int, float]) -> dict[str, float]:
    """How long one device takes at least for operations, bytes of memory, and bytes over so many links at once.

    Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785, with the interconnect as a third roof."""
    if part.chip is None:
        return {}
    share = part.chip.devices
    wired = sum(bytes / (links * part.chip.link / share) for links, bytes in sent.items() if links)
    return {
        "compute": flops * share / part.chip.flops,
        "memory": moved * share / part.chip.bandwidth,
        "interconnect": wired,
    }


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices."""
    for data in divisors(devices):
        for fsdp in divisors(devices // data):
            for tensor in divisors(devices // data // fsdp):
                sizes = (data, fsdp, tensor, devices // data // fsdp // tensor)
                yield dict(zip(AXES, sizes, strict=True))


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
