"""Accelerators by their data sheets, and slices of them by name: `v5p:16x16x16` is 4,096 chips in a torus."""

import math
import re
from typing import NamedTuple

from lovely_llama import check


class Chip(NamedTuple):
    """What a vendor states of one chip."""

    flops: float  # in bfloat16, each second
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes each second
    link: float  # bytes each second over one link, in one direction
    axes: int  # of the torus: two links for each
    pod: int  # chips in the largest slice
    wrap: int  # an axis whose length is a multiple of this closes to a ring
    devices: int = 1  # into which jax divides a chip


# Google's pages give the sum of all links in both directions: `link` is that divided by twice the number of links. Some
# pages give memory in GB where others have the same number in GiB; libtpu's limits are those of GiB.
CHIPS = {
    # docs.cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023, arXiv:2304.01433, table 4
    "v4": Chip(275e12, 32 * 2**30, 1.2e12, 50e9, 3, 4096, 4, devices=2),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 400e9 / 8, 2, 256, 16),  # docs.cloud.google.com/tpu/docs/v5e
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1200e9 / 12, 3, 6144, 4),  # docs.cloud.google.com/tpu/docs/v5p
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 800e9 / 8, 2, 256, 16),  # docs.cloud.google.com/tpu/docs/v6e
    # docs.cloud.google.com/tpu/docs/tpu7x: a chip is two devices, each with half of its memory
    "tpu7x": Chip(2307e12, 192 * 2**30, 7380e9, 1200e9 / 12, 3, 9216, 4, devices=2),
}


class Slice(NamedTuple):
    """Chips that are connected to each other; or devices of a CPU, of which there is no data sheet."""

    name: str
    chip: Chip | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """As many as jax sees."""
        return math.prod(self.shape) * (self.chip.devices if self.chip else 1)


def parse_chips(text: str) -> Slice:
    """The slice that a text such as v5p:16x16x16 or cpu:8 stands for."""
    name, _, sizes = text.partition(":")
    known = {**CHIPS, "cpu": None}
    check("chips", repr(text), name in known, f"{', '.join(CHIPS)} or cpu, such as v5e:4x4 or cpu:8")
    good = re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})*", sizes, re.ASCII)
    chip, shape = known[name], tuple(map(int, sizes.split("x"))) if good else ()
    example = "x".join("4" * chip.axes) if chip else "8"
    check("chips", repr(text), len(shape) == (chip.axes if chip else 1), f"a shape such as {name}:{example}")
    most = chip.pod if chip else 4096
    check("chips", f"{math.prod(shape):,} of {name}", math.prod(shape) <= most, f"at most {most:,} in one slice")
    return Slice(name, chip, shape)


def links(part: Slice, coordinates: list[tuple[int, ...]]) -> int:
    """How many of its links a chip can send over to reach a group of chips: those along the axes that the group spans.

    Both of an axis that closes to a ring, else one: at the end of a line there is no other. Groups that share links are
    not taken into account, so that times are at least those computed from this. 0: the group is within a chip.
    """
    if part.chip is None:
        return 0
    total = 0
    for size, found in zip(part.shape, zip(*coordinates, strict=True), strict=False):
        ring = len({*found}) == size and size % part.chip.wrap == 0
        total += 0 if len({*found}) == 1 else 2 if ring else 1
    return total
