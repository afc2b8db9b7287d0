"""Which rows of one matrix are which of another."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from .values import ROUNDINGS, Matrix, in_blocks

MOVED = 0.3  # the relative error of a row that is another one
KEYS, TRIED, PART = 64, 64, 1024  # columns by which rows are matched; rows tried first; rows matched at a time
SHOWN = 8  # numbers of a list that is told


def permutations(t: Matrix, c: Matrix) -> Iterator[Int[np.ndarray, " rows"]]:
    """Which row of ours each of theirs may be, but for a factor and rounding."""
    if t.shape[1] == 1:
        order = np.arange(len(t))
        order[np.argsort(t[:, 0], kind="stable")] = np.argsort(c[:, 0], kind="stable")
        yield order
        return
    for factor in (1.0, float(np.linalg.norm(t)) / max(float(np.linalg.norm(c)), 1e-30)):  # repeated rows have another
        order = matched(t, np.float32(factor) * c)
        if order is not None:
            yield order


def matched(t: Matrix, c: Matrix) -> Int[np.ndarray, " rows"] | None:
    """Which row of c each of t is, but for rounding; None if none has moved, or some are no row of c."""
    moved = np.flatnonzero(row_errors(t, c) > MOVED)
    columns = np.sort(np.random.default_rng(0).choice(t.shape[1], min(KEYS, t.shape[1]), replace=False))
    a, b = t[np.ix_(moved, columns)], c[:, columns]
    some = a[:: max(len(a) // TRIED, 1)]
    if not len(moved) or np.median(row_errors(b[nearest(some, b)], some)) > MOVED:
        return None
    for rounding in ROUNDINGS.values():
        if rounding is not in_blocks or c.shape[1] % 32 == 0:
            exact = equal_rows(t, rounding(c.reshape(-1)).reshape(c.shape))
            if exact is not None:
                return exact
    match = nearest(a, b)
    if (row_errors(b[match], a) > 2 * MOVED).any():
        return None
    order = np.arange(len(t))
    order[moved] = match
    return order


def equal_rows(t: Matrix, c: Matrix) -> Int[np.ndarray, " rows"] | None:
    """Which row of c each of t is, to the last bit: each once, whatever others are nearly the same."""
    places = defaultdict[bytes, list[int]](list)
    for i in reversed(range(len(c))):
        places[(c[i] + 0).tobytes()].append(i)  # 0 for -0
    found = [(places[(row + 0).tobytes()] or [-1]).pop() for row in t]
    return None if -1 in found else np.array(found)


def nearest(a: Matrix, b: Matrix) -> Int[np.ndarray, " rows"]:
    """The row of b that is nearest to each of a."""
    sizes = np.einsum("ij,ij->i", b, b)
    parts = [np.argmin(sizes - 2 * a[i : i + PART] @ b.T, 1) for i in range(0, len(a), PART)]
    return np.concatenate(parts)


def permuted(order: Int[np.ndarray, " rows"], what: str, field: str, width: int) -> tuple[str, list[list[int]]]:
    """A permutation in words, and the first of theirs that have moved, each with ours."""
    how = "permuted" if len(np.unique(order)) == len(order) else "of ours, some more than once"
    if what == ("columns" if field == "o" else "rows") and field in ("q", "k", "v", "o"):
        heads = order.reshape(-1, width)
        within = heads - width * np.arange(len(heads))[:, None]
        if (heads == heads[:, :1] + np.arange(width)).all() and not (heads[:, 0] % width).any():
            what, order = "heads", heads[:, 0] // width
        elif (within == within[0]).all():
            what, order = f"{what} of each head alike", within[0]
    moved = np.flatnonzero(order != np.arange(len(order)))[:SHOWN]
    return f"{what} {how}", [[int(i), int(order[i])] for i in moved]


def row_errors(t: Matrix, c: Matrix) -> Float[np.ndarray, " rows"]:
    """The relative error of each row."""
    d = t - c
    return np.sqrt(np.einsum("ij,ij->i", d, d)) / np.maximum(np.sqrt(np.einsum("ij,ij->i", c, c)), 1e-30)
