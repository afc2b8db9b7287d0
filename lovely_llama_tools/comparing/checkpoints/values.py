"""How two matrices differ whose numbers are in the same places: a factor, a dtype, or nearly the same numbers."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from ...formats.model import DTYPES
from ..bugs.bug import q8_0

NEAR = 0.3  # the relative error up to which numbers are nearly the same: two bits a weight leave less
COARSE = 0.03  # the most that a rounding of `ROUNDINGS` leaves
FLOAT32 = 3e-7  # a few roundings of float32, relative
ODD = 1e-4  # the share of numbers that may be rounded to the next one: other programs divide in another order
FIRST, PIECE = 2**12, 2**16  # numbers that are compared first, as most comparisons fail on them; and then at a time
MANY = 2**20  # numbers from which a factor is found
ALMOST = "nearly the same numbers"
LAST_BITS = "the same but for float32's rounding"
Flat = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "_ _"]


class Values(NamedTuple):
    """What theirs are to ours in words, empty if equal, and the relative error that this leaves."""

    words: str
    rest: float


def same(x: Flat) -> Flat:
    return x


def through(x: Flat, dtype: str) -> Flat:
    """x rounded to another dtype."""
    with np.errstate(over="ignore"):
        return x.astype(DTYPES[dtype]).astype(np.float32)


def truncated(x: Flat) -> Flat:
    """The upper 16 bits of each number, as one gets a bfloat16 by a shift."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def in_blocks(x: Flat) -> Flat:
    return np.asarray(q8_0(jnp.asarray(x)))


ROUNDINGS: dict[str, Callable[[Flat], Flat]] = {
    "": same,
    "rounded to bfloat16": partial(through, dtype="bfloat16"),
    "rounded to float16": partial(through, dtype="float16"),
    "rounded to Q8_0 blocks": in_blocks,
    "truncated to bfloat16": truncated,
}


def values(theirs: Matrix, ours: Matrix) -> Values | None:
    """What theirs are to ours, number by number; None if they are other numbers.

    A gain, which has one column, is never nearly another: all gains of a model are alike."""
    t, c, gain = theirs.reshape(-1), ours.reshape(-1), theirs.shape[1] == 1
    if np.array_equal(t, c):
        return Values("", 0.0)
    step = max(len(t) // FIRST, 1)
    factor, error = slope(t[::step], c[::step])
    if error < 1:  # else a sample is enough
        factor, error = slope(t, c)
    if not (gain or error <= NEAR):
        return None
    known = {name: f for name, f in ROUNDINGS.items() if f is not in_blocks or theirs.shape[1] % 32 == 0}
    if gain or error <= COARSE:
        for words, first, scale, shift, then, slack in ways(t, c, known, gain):
            if explained(t, c, known[first], scale, shift, known[then], slack):
                return Values(words, 0.0)
        for name, rounding in known.items():
            if name and explained(c, t, rounding, 1.0, 0.0, same, 0.0):
                return Values(f"finer; ours are theirs {name}", 0.0)
    said = f"× {factor:.3g}, " if abs(factor - 1) > 0.05 else ""
    return None if gain else Values(said + ALMOST, error)


def ways(t: Flat, c: Flat, known: dict[str, Any], gain: bool) -> Iterator[tuple[str, str, float, float, str, float]]:
    """Ways in which theirs may come of ours, the simplest first: in words, rounded by what, scaled, shifted, rounded by
    what again, and how far that is uncertain, relative."""
    for first, rounding in known.items():
        part = t[:MANY], rounding(c[:MANY])
        factor, error = slope(*part)
        # Rounding may be biased. What rounds a gain's few numbers could hide any factor near 1: none is tried.
        unsure = FLOAT32 + min(error, 1) * min(4 / math.sqrt(len(part[0])) + 0.05, 0.3)
        digits = max(1, min(6, int(-math.log10(unsure))))
        if not first:
            yield LAST_BITS, "", 1.0, 0.0, "", FLOAT32
            yield from ((name, "", 1.0, 0.0, name, 0.0) for name in known if name)
        lines = [(factor, 0.0, unsure, f"× {factor:.{digits}g}")] * (error <= COARSE and abs(factor - 1) > unsure)
        lines += [(1.0, -1.0, FLOAT32, "less 1"), (1.0, 1.0, FLOAT32, "plus 1")] * gain
        for scale, shift, slack, words in lines:
            yield f"{words}, {first}".removesuffix(", "), first, scale, shift, "", FLOAT32
            if shift or not gain:
                again = [first] if first else [name for name in known if name]
                yield from ((f"{words}, {then}", first, scale, shift, then, slack) for then in again)


def pieces(n: int) -> Iterator[slice]:
    """Slices of n numbers, a small one first."""
    yield slice(0, FIRST)
    yield from (slice(begin, begin + PIECE) for begin in range(FIRST, n, PIECE))


def inner(a: Flat, b: Flat) -> float:
    """Without BLAS, whose threads cost more than they save on pieces."""
    return float(np.einsum("i,i->", a, b))


def slope(t: Flat, c: Flat) -> tuple[float, float]:
    """The factor by which c is nearest to t, and the error that is left, relative to what c gives."""
    tt = tc = cc = 0.0
    for part in pieces(len(t)):
        a, b = t[part].astype(np.float64), c[part].astype(np.float64)
        tt, tc, cc = tt + inner(a, a), tc + inner(a, b), cc + inner(b, b)
    if tc == 0 or not math.isfinite(tc):  # float16 overflows
        return 0.0, math.inf
    return tc / cc, math.sqrt(max(tt * cc / tc**2 - 1, 0))


def distance(t: Flat, c: Flat) -> float:
    """‖t − c‖ / ‖c‖."""
    dd = cc = 0.0
    for part in pieces(len(t)):
        a, b = t[part].astype(np.float64), c[part].astype(np.float64)
        dd, cc = dd + inner(a - b, a - b), cc + inner(b, b)
    return math.sqrt(dd / cc) if cc else math.inf if dd else 0.0


def explained(
    t: Flat, c: Flat, first: Callable[[Flat], Flat], scale: float, shift: float, then: Callable[[Flat], Flat],
    slack: float,
) -> bool:  # fmt: skip
    """Whether theirs are ours rounded, scaled and shifted, and rounded again.

    Rounding is monotone: each number is between what the least and the greatest factor give, but for `ODD` ones, which
    may do little to the whole."""
    outside, left, spread = 0, 0.0, 0.0
    for part in pieces(len(t)):
        a, line, x = t[part], *(f(c[part]) * np.float32(scale) + np.float32(shift) for f in (same, first))
        width = np.float32(slack) * (x + np.copysign(np.float32(shift), x))
        ends = then(x - width), then(x + width)
        out = (a < np.minimum(*ends)) | (a > np.maximum(*ends))
        outside += int(out.sum())
        left += float(np.square(a - then(x))[out].sum())
        spread += float(np.square(a - line).sum())
        if outside > ODD * len(t):
            return False
    return left <= 0.03 * spread
