"""`diff`: somebody's logits beside the reference's, and the known bug that explains what sets them apart."""

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from lovely_llama import Config, check, check_tokens

from ..extras import counted, progress
from ..formats.model import DTYPES, Model
from .bugs import BUGS
from .candidates import SAME, Candidates, Rows, candidates_of, distance
from .dials import says, turned, window
from .judging import NEAR, begins, judged
from .properties import plain

PROMPT = 40  # ids of the prompt where none is given


class Verdict(NamedTuple):
    """What `diff` finds. `print` tells it in words."""

    verdict: str  # "same", "bug", "several" or "none"
    bugs: list[str]  # those of the catalogue that explain theirs, the nearest first
    error: float  # ‖theirs − ours‖ / ‖ours‖, ours with the first of `bugs`, or with the number of `dial`
    rounding: float  # the error that is to be expected of a correct program
    next: dict[str, Any] | None  # the name and error of the best that is ruled out
    first: int | None  # the position where they part
    dial: dict[str, Any] | None  # name, theirs and ours of a number that is not the right one
    dtype: str  # of theirs
    positions: list[float]  # the error of each, against ours without bugs
    begins: dict[str, Any] | None  # a hint: the bug that explains the most first positions, and how many
    hidden: list[str]  # bugs that these logits could not show

    def __str__(self) -> str:
        return told(self)


def default_prompt(config: Config) -> Int[np.ndarray, " seq"]:
    """Forty ids that fit the vocabulary, with a 0 among them."""
    ids = np.random.RandomState(0).randint(min(1, config.vocab - 1), config.vocab, min(PROMPT, config.ctx))
    ids[len(ids) // 5] = 0
    return ids.astype(np.int32)


def diff(
    model: Model, theirs: Callable[[Any], Any] | Any, tokens: Int[Any, " seq"] | Sequence[int] | None = None,
    *, dtype: str | None = None,
) -> Verdict:  # fmt: skip
    """Name the bug that makes somebody's logits differ from the reference's.

    `theirs` is a function from ids to logits, (seq) to (seq, vocab), or the logits themselves, in arrays that numpy or
    torch can read. The dtype in which theirs were computed is read off the numbers unless it is given: a float32
    unembedding over layers in bfloat16 hides it."""
    config = model.config
    ids = check_tokens(default_prompt(config) if tokens is None else tokens, config.vocab, config.ctx)
    given = theirs(ids) if callable(theirs) else theirs
    rows = plain(given)
    rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
    fits = rows.ndim == 2 and rows.shape[1] == config.vocab and len(rows) > 0
    check("logits", f"shape {rows.shape}", fits, f"({len(ids)}, {config.vocab}), a row for each token", "theirs")
    check("logits", "NaN or infinite in every row", bool(np.isfinite(rows).all(axis=1).any()), "some numbers", "theirs")
    kind = dtype or dtype_of(rows)
    check("dtype", kind, kind in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16")
    candidates = candidates_of(model, ids, kind)
    return verdict_on(rows[:, candidates.columns], candidates)


def dtype_of(rows: Rows) -> str:
    """The narrowest dtype that holds all these numbers."""
    numbers = rows[np.isfinite(rows)]
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            if (numbers.astype(DTYPES[name]).astype(np.float64) == numbers).all():
                return name
    return "float32"


def by_row(a: Rows, b: Rows) -> list[float]:
    """The distance of each of the last rows that both have."""
    count = min(len(a), len(b))
    ends = zip(a[len(a) - count :], b[len(b) - count :], strict=True)
    return [distance(x[None], y[None]).whole for x, y in ends]


def verdict_on(theirs: Rows, candidates: Candidates) -> Verdict:
    """Judge logits, at the columns that are compared."""
    same, again = candidates.of(SAME), candidates.again(SAME)
    error, own = distance(theirs, same), distance(again, same)
    positions = by_row(theirs, same)
    rows = [max(row, own.median) for row in by_row(again, same)]
    first = next((t for t, e in enumerate(positions) if NEAR * max(rows) < e < np.inf), None)
    facts: dict[str, Any] = {"rounding": own.whole, "first": first, "positions": positions, "dtype": candidates.dtype}
    facts |= {"dial": None, "begins": None, "next": None, "hidden": []}
    if error.whole <= NEAR * own.whole:
        facts["first"] = None
        return Verdict("same", [], error.whole, **facts)
    with progress("known bugs", len(BUGS), " bugs") as tell:
        found = candidates.all(tell)
    effects = {name: distance(rows, same).whole for name, rows in found.items()}
    own_values = {name for name, effect in effects.items() if effect == 0 and BUGS[name].config}  # no bug here
    facts["hidden"] = [name for name in found if name not in own_values and not effects[name] > NEAR * own.whole]
    fits, beside = judged(theirs, candidates, found)
    facts["next"] = {"name": beside.bug.name, "error": beside.error}
    long = [fit for fit in fits if len(found[fit.bug.name]) == len(theirs)]
    if names := [fit.bug.name for fit in long or fits]:
        return Verdict("bug" if len(names) == 1 else "several", names, (long or fits)[0].error, **facts)
    if first and (fit := window(theirs, candidates, first, own.whole)):
        facts["dial"] = {"name": "sliding window", "theirs": first, "ours": candidates.config.ctx}
        return Verdict("bug", [], fit.error, **facts)
    if (dial := turned(theirs, candidates, own.whole)) is not None:
        turn, value, fit = dial
        facts["dial"] = {"name": turn.name, "theirs": value, "ours": turn.ours}
        return Verdict("bug", [], fit.error, **facts)
    hint = begins(theirs, found, same, rows)
    facts["begins"] = hint and {"name": hint[0], "positions": hint[1]}
    return Verdict("none", [], error.whole, **facts)


# ---- In words --------------------------------------------------------------------------------------------------------


def told(v: Verdict) -> str:
    """A verdict in words: what was compared, where they part, how large rounding would be, and what explains it."""
    shown = [t for t in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if t < len(v.positions)]
    parts = [
        f"compared: logits on {counted(len(v.positions), 'position')}, theirs in {v.dtype}",
        "errors:   " + ", ".join(f"{v.positions[t]:.1e} at {t}" for t in shown),
        f"rounding: {v.rounding:.1e} is to be expected of a correct program",
    ]
    if v.first is not None:
        parts.append(f"they part at position {v.first}" + (AT_FIRST if v.first == 0 else ""))
    if v.verdict == "same":
        parts += ["", f"The same: theirs are {v.error:.1e} from the reference's."]
    for name in v.bugs:
        parts += ["", *story(name, v)]
    if v.dial:
        found = f"Found: {says(v.dial['name'], v.dial['theirs'], v.dial['ours'])}"
        parts += ["", found, f"  theirs are {v.error:.1e} from a Llama with that number"]
    if v.verdict == "several":
        parts += ["", "These logits cannot tell them apart." + " ".join(needs(v.bugs))]
    if v.verdict == "none":
        parts += ["", "No known bug explains theirs, nor does a number that is not the right one."]
        if v.begins:
            hint = f"A hint: the first {counted(v.begins['positions'], 'position')} look like “{v.begins['name']}”."
            parts.append(hint)
        parts.append("Record next: logits in float32 of the same tokens, or of a shorter prompt.")
    if v.next and v.verdict in ("bug", "several"):
        parts.append(f"The next best, “{v.next['name']}”, is {v.next['error']:.1e} away.")
    if v.hidden and v.verdict != "same":
        takes = (f"{name} (takes {BUGS[name].needs})" if BUGS[name].needs else name for name in v.hidden)
        parts += ["", fill("What these logits could not show: " + "; ".join(takes) + ".", 100)]
    return "\n".join(parts)


AT_FIRST = ", where attention has one key: q, k, rotation and mask cannot matter there"


def story(name: str, v: Verdict) -> list[str]:
    """What is known of a bug."""
    bug = BUGS[name]
    lines = [f"Found: {name}", f"  the program {bug.does}", f"  cure: {bug.cure}"]
    lines += [f"  seen: {bug.seen}"] * bool(bug.seen)
    return [*lines, f"  theirs are {v.error:.1e} from a Llama with it"] if name == v.bugs[0] else lines


def needs(names: Sequence[str]) -> list[str]:
    """What it takes to tell bugs apart, where rows say it."""
    return [f" To show, “{name}” takes {BUGS[name].needs}." for name in names if BUGS[name].needs]
