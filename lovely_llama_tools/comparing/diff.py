"""`diff`: somebody's logits beside the reference's, and the known bug that explains what sets them apart."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lovely_llama import Config, check, check_tokens

from ..extras import counted, progress, spans
from ..formats.model import DTYPES, Model
from .answers import opened
from .bugs import BUGS
from .candidates import SAME, Candidates, Rows, by_row, candidates_of, correlation, distance
from .dials import says, turned, window
from .judging import NEAR, begins, judged
from .naming import MAPS, recognised
from .pairs import pair
from .properties import plain
from .steps import Steps

NEVER = "more than logits"  # is what some bugs need to show
PROMPT = 40  # ids of the prompt where none is given
NOT_ROUNDED = ("embed", *MAPS)  # whose dtype need not be that of the computation
UNRELATED = "Theirs have nothing in common with the right ones: of another checkpoint, tokenizer or prompt?"


class Verdict(NamedTuple):
    """What `diff` finds. `print` tells it in words."""

    verdict: str  # "same", "bug", "several" or "none"
    bugs: list[str]  # those of the catalogue that explain theirs, the nearest first
    error: float  # ‖theirs − ours‖ / ‖ours‖, ours with the first of `bugs`, or with the number of `dial`
    rounding: float  # the error that is to be expected of a correct program
    next: dict[str, Any] | None = None  # the name and error of the best that is ruled out
    first: int | None = None  # the position where they part
    dial: dict[str, Any] | None = None  # name, theirs and ours of a number that is not the right one
    dtype: str = "float32"  # of theirs
    positions: Sequence[float] = ()  # the error of each, against ours without bugs
    begins: dict[str, Any] | None = None  # a hint: the bug that explains the most first positions, and how many
    hidden: Sequence[str] = ()  # bugs that these logits could not show
    steps: Sequence[dict[str, Any]] = ()  # of their activations, those that are wrong: `steps.Step`
    compared: int = 0  # how many activations were compared
    unknown: Sequence[str] = ()  # names of activations that are not known, and shapes of those that do not fit
    notes: Sequence[str] = ()  # what else is to be said
    together: bool = False  # whether `bugs` are there at once, or cannot be told apart

    def __str__(self) -> str:
        return told(self)


def default_prompt(config: Config) -> Int[np.ndarray, " seq"]:
    """Forty ids that fit the vocabulary, with a 0 among them."""
    ids = np.random.RandomState(0).randint(min(1, config.vocab - 1), config.vocab, min(PROMPT, config.ctx))
    ids[len(ids) // 5] = 0
    return ids.astype(np.int32)


def diff(
    model: Model | str | Path, theirs: Callable[[Any], Any] | Any,
    tokens: Int[Any, " seq"] | Sequence[int] | None = None, *, activations: Mapping[str, Any] | None = None,
    dtype: str | None = None, log_probabilities: bool = False, pairs: float | int = 0,
) -> Verdict:  # fmt: skip
    """Name the bug that makes somebody's logits differ from the reference's.

    `model` may be a path, to a folder made by `golden` too, of which the answers are known beforehand. `theirs` is a
    function from ids to logits, (seq) to (seq, vocab), or the logits themselves, in arrays that numpy or torch can
    read; None if there are activations alone. `activations` are arrays under the names and in the arrangement of
    `trace`, transformers, SGLang, llama2.c, llama.cpp or TransformerLens: each step is then judged on their inputs. The
    dtype in which theirs were computed is read off the numbers unless it is given: a float32 unembedding over layers in
    bfloat16 hides it. Log-probabilities may be NaN where they are not known. `pairs`: for how many seconds to look for
    two bugs at once where no single one explains theirs."""
    found = model if isinstance(model, Model) else opened(Path(model), tokens)
    known, model = (None, found) if isinstance(found, Model) else (found, found.model)
    config, prompt = model.config, known.tokens if known else default_prompt(model.config)
    ids = check_tokens(prompt if tokens is None else tokens, config.vocab, config.ctx)
    given = theirs(ids) if callable(theirs) else theirs
    arrays, unknown = recognised(activations or {}, config, len(ids))
    check(
        "logits", "none", given is not None or bool(arrays), "logits, or activations by names that are known", "theirs"
    )
    rows = None if given is None else checked_rows(given, len(ids), config, log_probabilities)
    told = [x for name, x in arrays.items() if name.rpartition(".")[2] not in NOT_ROUNDED]
    kinds = map(dtype_of, told if rows is None else [*told, rows])
    kind = dtype or min(kinds, default="float32")  # the narrowest comes first
    check("dtype", kind, kind in DTYPES, ", ".join(DTYPES))
    finite = np.isfinite(rows) if rows is not None and log_probabilities else None
    ready = known is not None and kind == known.dtype and finite is None
    candidates = known if known and ready else candidates_of(model, ids, kind, finite)
    notes = [] if rows is None or log_probabilities else not_numbers(rows)
    rows = None if rows is None else candidates.cut(rows)
    verdict = judge(candidates, rows, arrays, float(pairs))
    if log_probabilities and dtype is None and verdict.verdict == "none":
        notes.append(SIXTEEN)
    return verdict._replace(unknown=unknown, notes=[*notes, *verdict.notes])


def checked_rows(given: Any, count: int, config: Config, partly: bool) -> Rows:
    """Logits as they were given, a row for each token; of log-probabilities part of a row is enough."""
    rows = plain(given)
    rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
    fits = rows.ndim == 2 and rows.shape[1] == config.vocab and len(rows) > 0
    check("logits", f"shape {rows.shape}", fits, f"({count}, {config.vocab}), a row for each token", "theirs")
    finite = np.isfinite(rows)
    some = finite.any() if partly else finite.all(axis=1).any()
    check("logits", "NaN or infinite in every row", bool(some), "some numbers", "theirs")
    return rows


SIXTEEN = "A server often computes in 16 bits: --dtype bfloat16 would allow for that."


def not_numbers(rows: Rows) -> list[str]:
    """What is to be said of rows that hold something else than numbers."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    return [f"NaN or infinite in {counted(len(bad), 'row')}, from position {bad[0]} on: left out"] if len(bad) else []


def dtype_of(rows: Float[np.ndarray, "..."]) -> str:
    """The narrowest dtype that holds all these numbers."""
    numbers = rows[np.isfinite(rows)]
    for name in ("bfloat16", "float16"):
        with np.errstate(over="ignore"):
            if (numbers.astype(DTYPES[name]).astype(np.float64) == numbers).all():
                return name
    return "float32"


def judge(candidates: Candidates, rows: Rows | None, arrays: Mapping[str, Any], pairs: float) -> Verdict:
    """Judge activations, where there are any, step by step, and logits where that does not explain all."""
    if not arrays:
        assert rows is not None
        return by_logits(rows, candidates, pairs)
    of_all = rows is not None and len(rows) == len(candidates.tokens) and candidates.told is None
    steps = Steps(candidates, {**arrays, "logits": rows} if of_all else arrays)
    found = steps.judge()
    names = [*dict.fromkeys(name for step in found for name in step.bugs)]
    reasons = {*names, *(step.says for step in found if step.says)}
    groups = {(*step.bugs, step.says) for step in found if step.bugs or step.says}  # each of what looks alike
    whole = bool(found) and all(step.bugs or step.says for step in found)
    kind = "same" if not found else "none" if not reasons else "bug" if len(reasons) == 1 else "several"
    if rows is None:
        error, rounding = (max(each.values(), default=0.0) for each in (steps.errors, steps.rounding))
        verdict = Verdict(kind, [], error, rounding, first=steps.first(), dtype=candidates.dtype)
    elif whole:
        verdict = parted(rows, candidates)
    else:
        verdict = by_logits(rows, candidates, pairs)
    if reasons and verdict.verdict != "bug":
        error = max(step.left for step in found)
        verdict = verdict._replace(verdict=kind, bugs=names, error=error, together=len(groups) > 1)
    return verdict._replace(steps=[step._asdict() for step in found], compared=len(steps.errors))


def parted(rows: Rows, candidates: Candidates) -> Verdict:
    """How far theirs are from the right logits, and from which position on: "same" if by rounding alone."""
    same, own, kind = candidates.right, candidates.noise(SAME).whole, candidates.dtype
    error, positions, limit = distance(rows, same).whole, by_row(rows, same), NEAR * max(candidates.roundings)
    if error <= NEAR * own:
        return Verdict("same", [], error, own, dtype=kind, positions=positions)
    first = next((t for t, e in enumerate(positions) if limit < e < np.inf), None)
    return Verdict("none", [], error, own, first=first, dtype=kind, positions=positions)


def by_logits(rows: Rows, candidates: Candidates, pairs: float) -> Verdict:
    """Judge logits, at the columns that are compared."""
    verdict, own = parted(rows, candidates), candidates.noise(SAME).whole
    if verdict.verdict == "same":
        return verdict
    theirs, same, first, config = candidates.at(rows), candidates.of(SAME), verdict.first, candidates.config
    with progress("known bugs", len(BUGS), " bugs") as tell:
        found = candidates.all(tell)
    effects = {name: distance(rows, same).whole for name, rows in found.items()}
    own_values = {name for name, effect in effects.items() if effect == 0 and BUGS[name].config}  # no bug here
    shown = {name for name, effect in effects.items() if effect > NEAR * own or BUGS[name].needs.startswith(NEVER)}
    hidden = [name for name in found if name not in own_values | shown]
    fits, beside = judged(theirs, candidates, found, len(rows))
    verdict = verdict._replace(hidden=hidden, next={"name": beside.bug.name, "error": beside.error})
    explained = None
    if names := [fit.bug.name for fit in fits]:
        kind = "bug" if len(names) == 1 else "several"
        explained = verdict._replace(verdict=kind, bugs=names, error=fits[0].error)
        if fits[0].near:
            return explained
    if first and (fit := window(theirs, candidates, first, own)):
        dial = {"name": "sliding window", "theirs": first, "ours": config.ctx}
        return verdict._replace(verdict="bug", error=fit.error, dial=dial)
    if (found_dial := turned(theirs, candidates, own)) is not None:
        turn, value, fit = found_dial
        dial = {"name": turn.name, "theirs": value, "ours": turn.ours}
        return verdict._replace(verdict="bug", error=fit.error, dial=dial)
    if explained:  # all but a little, and no number explains it better
        return explained
    if pairs and (two := pair(theirs, candidates, found, pairs)):
        names, fit = two
        return verdict._replace(verdict="several", bugs=names, error=fit.error, together=True)
    hint = begins(theirs, found, same, candidates.roundings)
    notes = [UNRELATED] if abs(correlation(theirs, same)) < 0.1 else []
    return verdict._replace(begins=hint and {"name": hint[0], "positions": hint[1]}, notes=notes)


# ---- In words --------------------------------------------------------------------------------------------------------


def told(v: Verdict) -> str:
    """A verdict in words: what was compared, where they part, how large rounding would be, and what explains it."""
    shown = [t for t in (0, 1, 2, 8, 32, 128, 512) if t < len(v.positions)]
    compared = [f"logits on {counted(len(v.positions), 'position')}"] * bool(v.positions)
    compared += [f"{counted(v.compared, 'activation')}"] * bool(v.compared)
    parts = [f"compared: {' and '.join(compared)}, theirs in {v.dtype}"]
    parts += [f"note:     {note}" for note in v.notes]
    if v.unknown:
        names = dict.fromkeys(re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "N", name) for name in v.unknown)
        parts.append(fill(f"unknown:  {', '.join(names)}", 100, subsequent_indent=" " * 10))
    if v.positions:
        parts.append("errors:   " + ", ".join(f"{v.positions[t]:.1e} at {t}" for t in shown))
    parts.append(f"rounding: {v.rounding:.1e} is to be expected of a correct program")
    if v.first is not None:
        parts.append(f"they part at position {v.first}" + (AT_FIRST if v.first == 0 else ""))
    if v.verdict == "same":
        parts += ["", f"The same: theirs are {v.error:.1e} from the reference's."]
    if v.steps:
        parts += ["", "These steps differ, each computed by the reference from their inputs:"]
        parts += [f"  {in_words(step)}" for step in v.steps]
    for name in v.bugs:
        parts += ["", *story(name, v)]
    if v.dial:
        found = f"Found: {says(v.dial['name'], v.dial['theirs'], v.dial['ours'])}"
        parts += ["", found, f"  theirs are {v.error:.1e} from a Llama with that number"]
    if v.together and len(v.bugs) > 1:
        left = f"With them in the reference, {'each step is' if v.steps else 'logits are'} {v.error:.1e} from theirs"
        parts += ["", f"They are there at once. {left}{' at most' if v.steps else ''}."]
    elif v.verdict == "several":
        parts += ["", "These logits cannot tell them apart." + " ".join(needs(v.bugs))]
    if v.verdict == "none":
        parts += ["", "No known bug explains theirs, nor does a number that is not the right one."]
        if v.begins:
            hint = f"A hint: the first {counted(v.begins['positions'], 'position')} look like “{v.begins['name']}”."
            parts.append(hint)
        parts.append("Record next: " + ("what stands before these steps." if v.steps else NEXT))
    if v.next and v.verdict in ("bug", "several") and not v.together:
        parts.append(f"The next best, “{v.next['name']}”, is {v.next['error']:.1e} away.")
    if v.hidden and v.verdict != "same":
        takes = (f"{name} (takes {BUGS[name].needs})" if BUGS[name].needs else name for name in v.hidden)
        parts += ["", fill("What these logits could not show: " + "; ".join(takes) + ".", 100)]
    return "\n".join(parts)


AT_FIRST = ", where attention has one key: q, k, rotation and mask cannot matter there"
NEXT = "logits in float32 of the same tokens, or of a shorter prompt, or activations (docs/diff.md)."


def in_words(step: Mapping[str, Any]) -> str:
    """A wrong step: its layers, its error, and what explains it."""
    layers = step["layers"]
    where = f" of layer{'s' * (len(layers) > 1)} {spans(layers)}" if layers else ""
    why = " or ".join(step["bugs"]) or step["says"] or "not explained"
    return f"{step['step']}{where}: {step['error']:.1e} off: {why}"


def story(name: str, v: Verdict) -> list[str]:
    """What is known of a bug."""
    bug = BUGS[name]
    lines = [f"Found: {name}", f"  the program {bug.does}"]
    lines += [f"  as if {function} had {new} for {old}" for function, old, new in bug.words if "\n" not in new]
    lines.append(f"  cure: {bug.cure}")
    lines += [f"  seen: {bug.seen}"] * bool(bug.seen)
    alone = name == v.bugs[0] and not (v.together and len(v.bugs) > 1)
    return [*lines, f"  theirs are {v.error:.1e} from a Llama with it"] if alone else lines


def needs(names: Sequence[str]) -> list[str]:
    """What it takes to tell bugs apart, where rows say it."""
    return [f" To show, “{name}” takes {BUGS[name].needs}." for name in names if BUGS[name].needs]
