"""Two known bugs at once, from logits alone."""

import time
from itertools import combinations

import numpy as np
from jaxtyping import Float

from ..extras import progress
from .bugs import BUGS, both
from .candidates import SAME, Candidates, Rows, distance
from .judging import Fit, measured


def pair(theirs: Rows, candidates: Candidates, found: dict[str, Rows], seconds: float) -> tuple[list[str], Fit] | None:
    """Two bugs that explain theirs together, sought for some seconds."""
    same, end = candidates.of(SAME), time.monotonic() + seconds
    rounding = candidates.noise(SAME).whole
    order = by_sum(theirs, same, found)
    with progress("pairs of bugs", len(order), " pairs") as tell:
        for a, b in order:
            if time.monotonic() > end:
                return None
            tell(1)
            if (bug := both(BUGS[a], BUGS[b])) is None:
                continue
            rows = candidates.read(candidates.llama(bug))
            if distance(theirs, rows).whole > 0.1 * distance(rows, same).whole:
                continue
            fit = measured(theirs, bug, rows, same, candidates.noise(bug), rounding)
            if fit.near and fit.whole:
                return [a, b], fit
    return None


def by_sum(theirs: Rows, same: Rows, found: dict[str, Rows]) -> list[tuple[str, str]]:
    """Pairs of bugs, first those whose effects added up are nearest to theirs, as small effects do add up; in turns
    with those of which each is near by itself."""
    count = len(theirs)
    names = [name for name, rows in found.items() if len(rows) == count == len(same)]

    def effect(rows: Rows) -> Float[np.ndarray, " _"]:
        return np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows - same, 0).ravel()

    whole, effects = effect(theirs), np.stack([effect(found[name]) for name in names])
    products, along = effects @ effects.T, effects @ whole
    alone = np.diag(products) - 2 * along  # ‖whole − effect‖², but for ‖whole‖²
    left = alone[:, None] + alone + 2 * products
    pairs = [*combinations(range(len(names)), 2)]
    first = sorted(pairs, key=lambda pair: left[pair])
    second = sorted(pairs, key=lambda pair: alone[pair[0]] + alone[pair[1]])
    turns = dict.fromkeys(pair for both in zip(first, second, strict=True) for pair in both)
    return [(names[a], names[b]) for a, b in turns]
