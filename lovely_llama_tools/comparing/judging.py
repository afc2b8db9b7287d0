"""Which known bug explains somebody's logits: the rule, on numbers alone.

A candidate fits if theirs are as near to it as rounding allows, and if what it changes is there in its whole size, not
less and not more. Rounding goes in thousands of directions and a bug in one, so that this tells a bug from rounding
that is larger.
"""

from typing import NamedTuple

from .bugs import BUGS, Bug
from .candidates import SAME, Candidates, Distance, Rows, distance, slope

NEAR = 3  # times the rounding of one program: other programs round up to 1.5 × as much; twice that
ALONG = 0.5  # of rounding, along one direction; a quarter was the most that was seen
LEFT = 0.01  # of a bug's effect, which may remain where it explains all but a little


class Fit(NamedTuple):
    """How a candidate explains theirs."""

    bug: Bug
    error: float  # between theirs and it
    rounding: float  # its own
    effect: float  # between it and the right logits
    near: bool
    whole: bool  # its slope is 1
    spread: float  # of its slope


def measured(theirs: Rows, bug: Bug, rows: Rows, same: Rows, again: Distance, rounding: float) -> Fit:
    """A candidate beside theirs. `again` is its own rounding, `rounding` that of the right one."""
    error, effect = distance(theirs, rows), distance(rows, same).whole
    own = again.whole if again.whole < effect else 0.0  # rounding must not do as much as the bug
    near = error.whole <= NEAR * max(own, rounding) or error.median <= NEAR * again.median
    near = near and error.whole < distance(theirs, same).whole
    value, spread = slope(theirs, rows, same)
    spread = max(spread, ALONG * max(again.whole, rounding) / max(effect, 1e-300))
    return Fit(bug, error.whole, again.whole, effect, near, abs(value - 1) <= spread, spread)


def judged(
    theirs: Rows, candidates: Candidates, found: dict[str, Rows], count: int, nearest: int = 3
) -> tuple[list[Fit], Fit]:
    """The candidates that explain theirs, the nearest first, and the nearest of all that do not.

    `count`: of their rows. That a token is lost shows in it alone, where nothing sees the first one anyway."""
    same = candidates.of(SAME)
    rounding = candidates.noise(SAME).whole
    order = sorted(found, key=lambda name: distance(theirs, found[name]).whole)
    fits, beside = list[Fit](), list[Fit]()
    for place, name in enumerate(order):
        if place >= nearest and distance(theirs, found[name]).whole > 10 * NEAR * rounding:
            break
        fit = measured(theirs, BUGS[name], found[name], same, candidates.noise(BUGS[name]), rounding)
        shows = fit.effect > ALONG * rounding
        (fits if fit.near and fit.whole and shows else beside).append(fit)
    if not fits:
        fits = [fit for fit in beside[:1] if fit.error <= LEFT * fit.effect]
        beside = beside[len(fits) :]
    fits = [fit for fit in fits if candidates.count(fit.bug) == count] or fits
    a = found[fits[0].bug.name] if fits else same
    kept = [f for f in fits if f is fits[0] or not ruled_out(theirs, a, found[f.bug.name], fits[0].rounding)]
    gone = sorted([*beside, *(fit for fit in fits if fit not in kept)], key=lambda fit: fit.error)
    return kept, gone[0] if gone else kept[-1]


def ruled_out(theirs: Rows, nearest: Rows, other: Rows, rounding: float) -> bool:
    """Whether what sets another candidate apart from the nearest, if that is more than rounding, is not in theirs."""
    apart = distance(other, nearest).whole
    value, spread = slope(theirs, other, nearest)
    return apart > 2 * rounding and value + max(spread, ALONG * rounding / apart) < 1


def begins(theirs: Rows, found: dict[str, Rows], same: Rows, rows: list[float]) -> tuple[str, int] | None:
    """The candidate that explains the most first positions, if more than the right logits do: a hint."""

    def explained(candidate: Rows) -> int:
        count = min(len(candidate), len(theirs))
        for t in range(count):
            one = distance(theirs[len(theirs) - count + t :][:1], candidate[len(candidate) - count + t :][:1])
            if not one.whole <= NEAR * rows[min(t, len(rows) - 1)]:
                return t
        return count

    right = explained(same)
    best = max(found, key=lambda name: explained(found[name]))
    count = explained(found[best])
    return (best, count) if count > right else None
