"""`diff` of two models: what differs in their configs, and what each of their tensors is to ours."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from lovely_llama import Config, RopeScaling

from ...extras import counted, progress, spans
from ...formats.model import Model
from .permutations import SHOWN, permutations, permuted, row_errors
from .relations import Place, Samples, likely, matrix, sampled, tensors_of
from .values import ALMOST, Matrix, distance, values

CLOSE = 0.1  # the relative error of a gain up to which it is nearly the same: all gains of a model are alike
ODD_ROWS = 5  # a row whose error is so many times the median is other numbers
PATHS = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.o", "gate": "ffn.gate", "up": "ffn.up",
         "down": "ffn.down"}  # fmt: skip


class Differences(NamedTuple):
    """How a model differs from ours. `print` tells it in words."""

    verdict: str  # "same" or "different"
    config: list[dict[str, Any]]  # the name, theirs and ours of each field that differs
    # Tensors that differ alike: `names`, in which `layers` (None: outside), the `relation` of theirs to ours in words,
    # `of`, the layers of ours that they are where those are others, `permutation`, the beginning of the first one's,
    # `error`, the largest ‖theirs − ours‖ / ‖ours‖ (None where shapes differ), and `rest`, what of that is unexplained.
    tensors: list[dict[str, Any]]
    compared: int  # the number of tensors

    def __str__(self) -> str:
        return told(self)


class Finding(NamedTuple):
    """What one of their tensors is to ours."""

    place: Place
    source: Place  # the tensor of ours that it is
    words: str
    error: float | None
    rest: float | None
    permutation: list[list[int]] | None = None  # of the first that have moved, theirs and ours


class Search(NamedTuple):
    """Our model, and samples of it, which are taken once something differs."""

    ours: dict[Place, Array]
    samples: Callable[[], Samples]
    config: Config


def diff_models(ours: Model, theirs: Model) -> Differences:
    """Compare two models tensor by tensor, and say what theirs are to ours where they differ."""
    config, own, others = differing(ours.config, theirs.config), tensors_of(ours), tensors_of(theirs)
    tied = ours.config.tied, theirs.config.tied
    if all(tied):
        del others[None, "unembed"]
    search = Search(own, cache(partial(sampled, own, ours.config)), ours.config)
    found = list[Finding]()
    with progress("comparing", len(others)) as advance:
        for place, array in others.items():
            c = matrix(place[1], own[place]) if place in own else None
            found += finding(matrix(place[1], array), c, place, search)
            advance(1)
    if tied[0] != tied[1]:
        found = untied(found, f"{'theirs' if tied[1] else 'ours'} is tied to the embedding")
    verdict = "different" if config or found else "same"
    return Differences(verdict, config, grouped(found), len(others))


def differing(ours: Config, theirs: Config) -> list[dict[str, Any]]:
    """The fields of two configs that differ, by more than a number's rounding to float32."""
    pairs = list[tuple[str, Any, Any]]()
    for field in fields(Config):
        own, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(own, RopeScaling) and isinstance(other, RopeScaling):
            pairs += [(f"rope_scaling.{name}", a, getattr(other, name)) for name, a in own._asdict().items()]
        else:
            own, other = (x._asdict() if isinstance(x, RopeScaling) else x for x in (own, other))
            pairs.append((field.name, own, other))
    return [{"name": name, "theirs": b, "ours": a} for name, a, b in pairs if a != b and not is_rounded(a, b)]


def is_rounded(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=2**-23)


# ---- One tensor ------------------------------------------------------------------------------------------------------


def finding(t: Matrix, c: Matrix | None, place: Place, search: Search) -> list[Finding]:
    """What a tensor is to ours; nothing if it equals that in its place."""
    if c is None:
        return [explained(t, c, place, search)]
    if t.shape != c.shape:
        return [Finding(place, place, unlike(t, c), None, None)]
    if np.array_equal(t, c):
        return []
    bad = list[str]()
    for x, whose in ((t, "theirs"), (c, "ours")):
        if not np.isfinite(x).all():
            at = np.argwhere(~np.isfinite(x))
            more = f" and {len(at) - 1:,} more" if len(at) > 1 else ""
            bad.append(f"{'NaN' if np.isnan(x).any() else '∞'} in {whose} at {at[0].tolist()}{more}")
    if bad:
        good = np.isfinite(t) & np.isfinite(c)
        t, c = (np.where(good, x, np.float32(0)) for x in (t, c))
    if np.array_equal(t, c):
        return [Finding(place, place, "; ".join(bad), None, None)]
    found = explained(t, c, place, search)
    return [found._replace(words="; ".join([*bad, found.words]))] if bad else [found]


def unlike(t: Matrix, c: Matrix) -> str:
    """How tensors of different shapes differ."""
    said, n = f"shape {list(t.shape)}, ours {list(c.shape)}", min(len(t), len(c))
    if t.shape[1] != c.shape[1]:
        return said
    common = values(t[:n], c[:n])
    return f"{said}; the first {n} rows {(common.words or 'equal') if common else 'other numbers'}"


def explained(t: Matrix, c: Matrix | None, place: Place, search: Search) -> Finding:
    """What explains all of a tensor; else what explains most of it."""
    nearly, error = list[Finding](), math.inf if c is None else distance(t.reshape(-1), c.reshape(-1))
    error = error if math.isfinite(error) else None
    for found in attempts(t, c, place, search):
        if found.rest == 0:
            return found._replace(error=error)
        nearly.append(found)
    partly = None if c is None else but_for_rows(t, c)
    if partly:
        return Finding(place, place, partly, error, error)
    if nearly:
        return min(nearly, key=rest)._replace(error=error)
    words = "no layer of ours" if c is None else ALMOST if error is not None and error < CLOSE else "other numbers"
    return Finding(place, place, words, error, error)


def rest(found: Finding) -> float:
    return found.rest or 0


def attempts(t: Matrix, c: Matrix | None, place: Place, search: Search) -> Iterator[Finding]:
    """Whatever of ours explains theirs, at least nearly."""
    same = None if c is None else values(t, c)
    if same:
        yield Finding(place, place, same.words, None, same.rest)
    for alike in likely(t, place, search.samples()):
        layer, field, relation = alike[0]
        ours = matrix(field, relation.of(lambda name, i=layer: search.ours[i, name], field, search.config))
        found = values(t, ours)
        if found and ((layer, field) != place or relation.name):
            names = " or ".join(dict.fromkeys(candidate.relation.name for candidate in alike if relation.name))
            yield Finding(place, (layer, field), ", ".join(filter(None, (names, found.words))), None, found.rest)
    if c is None:
        return
    for what, a, b in (("rows", t, c), ("columns", t.T, c.T)):
        for order in permutations(a, b):
            found = values(t, b[order] if what == "rows" else b[order].T)
            if found:
                words, moves = permuted(order, what, place[1], search.config.head_dim)
                yield Finding(place, place, ", ".join(filter(None, (words, found.words))), None, found.rest, moves)


def but_for_rows(t: Matrix, c: Matrix) -> str:
    """Which rows are other numbers where most are explained; empty if it is not so."""
    errors = row_errors(t, c)
    other = errors > max(ODD_ROWS * float(np.median(errors)), 1e-6)
    found = values(t[~other], c[~other]) if 0 < other.sum() < len(t) / 2 else None
    if found is None or found.rest or (found.words and t.shape[1] == 1):
        return ""
    (at,), what = np.nonzero(other), "row" if t.shape[1] > 1 else "number"
    listed = ", ".join(map(str, at[:SHOWN])) + ", …" * (len(at) > SHOWN)
    rest = f", the rest {found.words}" if found.words else ""
    return f"other numbers in {len(at):,} of {counted(len(t), what, ',')} ({listed}){rest}"


# ---- In words --------------------------------------------------------------------------------------------------------


def grouped(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings, those together that are alike: in several layers, and of several tensors."""
    sources = {f.place: f.source for f in found}
    alike, groups = defaultdict[Any, list[Finding]](list), defaultdict[Any, list[list[Finding]]](list)
    for f in found:
        (layer, field), (other, source) = f.place, f.source
        moved = None not in (layer, other) and layer != other
        said = ""
        if source != field:
            exchanged = sources.get((layer, source)) == (layer, field) and not moved
            said = f"exchanged with {path(source)}" if exchanged else f"that of {path(source)}"
            said += f" of layer {other}" if layer is None and other is not None else ""
        alike[field, ", ".join(filter(None, (said, f.words))), moved].append(f)
    for (_, words, moved), fs in alike.items():
        groups[words, moved, tuple(f.place[0] for f in fs), tuple(f.source[0] for f in fs)].append(fs)
    return [group(words, moved, fss) for (words, moved, *_), fss in groups.items()]


def group(words: str, moved: bool, alike: list[list[Finding]]) -> dict[str, Any]:
    """Findings that are alike: a list for each of some tensors, of the same layers."""
    first, every = alike[0], [f for fs in alike for f in fs]
    of = [f.source[0] for f in first] if moved else None
    if of:
        one = len(set(of)) == 1
        words = ", ".join(filter(None, (f"that of {layers_(of[:1])}" if one else f"those of {layers_(of)}", words)))
    errors, left = ([x for x in xs if x is not None] for xs in zip(*((f.error, f.rest) for f in every), strict=True))
    return {
        "names": [path(fs[0].place[1]) for fs in alike],
        "layers": None if first[0].place[0] is None else [f.place[0] for f in first],
        "relation": words,
        "of": of,
        "permutation": first[0].permutation,
        "error": max(errors, default=None),
        "rest": max(left, default=None),
    }


def untied(found: list[Finding], said: str) -> list[Finding]:
    """Findings on a tied model and one that is not."""
    at = None, "unembed"
    unembed = next((f for f in found if f.place == at), Finding(at, at, "equal", 0.0, 0.0))
    words = "; ".join((unembed.words, said)) if unembed.words else said
    return [*(f for f in found if f.place != at), unembed._replace(words=words)]


def path(field: str) -> str:
    """A tensor's name within its layer."""
    return PATHS.get(field, field)


def layers_(numbers: Sequence[int | None]) -> str:
    """Layers in words."""
    return f"layer{'s' * (len(numbers) > 1)} {spans([n for n in numbers if n is not None])}"


def told(differences: Differences) -> str:
    """Differences in words."""
    _, config, tensors, compared = differences
    if differences.verdict == "same":
        return f"The same: the config, and all {counted(compared, 'tensor')}"
    lines = [f"config: {field['name']} is {field['theirs']}, ours {field['ours']}" for field in config]
    for found in tensors:
        names = ", ".join(found["names"]) if len(found["names"]) < 9 else "all tensors"
        where = f"{layers_(found['layers'])}, {names}" if found["layers"] else names
        moves = ", ".join(f"{i} is ours' {j}" for i, j in found["permutation"] or ())
        said = f" ({moves}{', …' * (len(found['permutation']) == SHOWN)})" if moves else ""
        if found["error"] is not None:
            said += f"; relative error {found['error']:.2g}"
            said += f", {found['rest']:.2g} of it unexplained" * (0 < found["rest"] < 0.9 * found["error"])
        lines.append(f"{where}: {found['relation']}{said}")
    n = compared - sum(len(found["names"]) * len(found["layers"] or [0]) for found in tensors)
    return "\n".join(["Different", *lines, f"{counted(n, 'other tensor')} the same" if n else "no tensor the same"])
