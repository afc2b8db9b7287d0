"""Faults that no row of the catalogue has: a number that is not the right one, found by turning it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lovely_llama import Config, Params

from .bugs import Bug
from .bugs.around import EMBEDDING
from .bugs.attention import VISIBLE, scaled
from .bugs.bug import attention, feed_forward, fixed
from .bugs.rotary import POSITION, angles
from .bugs.rotary import scaling as scaled_by
from .candidates import SAME, Candidates, Rows, distance
from .judging import Fit, measured
from .variants import Words

GRID = 9  # values at first, equal steps of the logarithm
GOLDEN = (5**0.5 - 1) / 2


class Dial(NamedTuple):
    """A number of a Llama that can be turned: its name, the right value, how far, and the bug of another value."""

    name: str
    ours: float
    reach: float  # the largest factor, up or down
    bug: Callable[[float], Bug]


def says(name: str, theirs: float, ours: float) -> str:
    """A number that is not the right one, in words."""
    value = f"{float(f'{theirs:.4g}'):g}"
    return f"{name} × {value}" if ours == 1 else f"{name} {value} instead of {ours:g}"


def window(theirs: Rows, candidates: Candidates, first: int, rounding: float) -> Fit | None:
    """A sliding window: the first tokens see all, and the first that does not tells its width."""
    words = (Words("attend", VISIBLE, f"{VISIBLE} & (last - {first} < position)"),)
    bug = Bug(f"a sliding window of {first} tokens", "", "", words=words)
    fit = measured(theirs, bug, candidates.of(bug), candidates.of(SAME), candidates.noise(bug), rounding)
    return fit if fit.near and fit.whole else None


def dials(candidates: Candidates) -> list[Dial]:
    """Those of a model. All leave its layers as they are compiled."""
    config = candidates.config

    def dial(name: str, ours: float, reach: float, bug: Callable[[str, float], Bug]) -> Dial:
        def named(value: float) -> Bug:
            return bug(says(name, value, ours), value)

        return Dial(name, ours, reach, named)

    def readout(x: float) -> Callable[[Params, Config], Params]:
        return lambda params, _: params._replace(norm=x * params.norm)

    def words(name: str, words: tuple[Words, ...]) -> Bug:
        return Bug(name, "", "", words=words)

    def params(name: str, change: Callable[[Params, Config], Params]) -> Bug:
        return Bug(name, "", "", params=change)

    scaling = config.rope_scaling
    own = list[Dial]()
    if scaling:
        own.append(dial("the scaling's factor", float(scaling.factor), 16.0,
                        lambda name, x: Bug(name, "", "", config=scaled_by(factor=x))))  # fmt: skip
    return [
        *own,
        dial("theta", float(config.theta), 1e3, lambda name, x: Bug(name, "", "", config=fixed(theta=x))),
        dial("eps", float(config.eps), 1e4, lambda name, x: Bug(name, "", "", config=fixed(eps=x))),
        dial("positions", 1.0, 16.0, lambda name, x: words(name, angles(f"f * ({POSITION} * {x!r})"))),
        dial("scores", 1.0, 16.0, lambda name, x: words(name, scaled(f"{x!r}"))),
        dial("the embedding", 1.0, 64.0,
             lambda name, x: words(name, (Words("embed", EMBEDDING, f"{EMBEDDING} * {x!r}"),))),
        dial("attention's answers", 1.0, 16.0,
             lambda name, x: params(name, attention(lambda w, _: w._replace(o=x * w.o)))),
        dial("the feed-forward's answers", 1.0, 16.0,
             lambda name, x: params(name, feed_forward(lambda w, _: w._replace(down=x * w.down)))),
        dial("the logits", 1.0, 64.0, lambda name, x: params(name, readout(x))),
    ]  # fmt: skip


def turned(theirs: Rows, candidates: Candidates, rounding: float) -> tuple[Dial, float, Fit] | None:
    """The dial and its value that explain theirs, if any: a grid for each, then a golden section for the best three."""
    same = candidates.of(SAME)

    def error(dial: Dial, at: float) -> float:
        rows = candidates.read(candidates.llama(dial.bug(float(dial.ours * np.exp(at)))))
        return distance(theirs, rows).whole

    tried = list[tuple[float, Dial, float, float]]()
    for dial in dials(candidates):
        step = 2 * math.log(dial.reach) / (GRID - 1)
        best = min((error(dial, (i - GRID // 2) * step), (i - GRID // 2) * step) for i in range(GRID))
        tried.append((best[0], dial, best[1], step))
    for _, dial, middle, step in sorted(tried, key=lambda one: one[0])[:3]:
        value = float(dial.ours * np.exp(section(lambda at, dial=dial: error(dial, at), middle - step, middle + step)))
        bug = dial.bug(value)
        fit = measured(theirs, bug, candidates.of(bug), same, candidates.noise(bug), rounding)
        if fit.near and fit.whole and fit.effect > 5 * rounding:
            return dial, value, fit
    return None


def section(f: Callable[[float], float], low: float, high: float, steps: int = 32) -> float:
    """Where a function is least between two numbers. Kiefer 1953, Proceedings of the AMS 4, golden-section search."""
    a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_a, at_b = f(a), f(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - GOLDEN * (high - low)
            at_a = f(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + GOLDEN * (high - low)
            at_b = f(b)
    return (low + high) / 2
