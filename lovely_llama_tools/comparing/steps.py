"""Each step of a run judged by itself: what the library computes from *their* inputs, beside what they computed.

A note of `trace` puts their array in the place of ours, so that errors do not travel: two faults at once, or a fault in
one layer, are each found. What they did not record is computed, and a step is then as long as from one of their arrays
to the next.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Float

from lovely_llama import Params

from ..extras import progress
from .bugs import BUGS, Bug
from .bugs.bug import halves, through, unchecked
from .candidates import SAME, Candidates, Distance, Rows, by_row, distance
from .judging import ALONG, NEAR, Fit, measured, ruled_out
from .trace import IN_LAYERS, NOTES, ONCE, Notes
from .variants import Words, rewritten, variant

ROUNDING = {"float32": 1e-6, "bfloat16": 4.2e-3, "float16": 5.3e-4}  # of a step, several times a rounding of its answer
WEIGHTS = {  # of a layer's steps
    "attn_norm": "attn_norm", "q": "attn.q", "k": "attn.k", "v": "attn.v", "attn": "attn.o", "ffn_norm": "ffn_norm",
    "gate": "ffn.gate", "up": "ffn.up", "ffn": "ffn.down",
}  # fmt: skip
ORDERS: dict[str, Callable[[Any], Any]] = {"": jnp.asarray, ", in Hugging Face's order": halves}
Place = tuple[str, int | None]  # a step and its layer
Explained = tuple[dict[Place, Fit], list[Place]]  # wrong places that a bug explains, and right ones that it breaks


class Step(NamedTuple):
    """A step that is wrong."""

    step: str  # by its name in `trace`
    layers: list[int]  # none of a step that a model has once
    error: float  # ‖theirs − ours‖ / ‖ours‖, ours computed from their inputs; the largest of these layers
    left: float  # of that, with the first of `bugs` in ours
    bugs: list[str]  # of the catalogue, which explain it; several cannot be told apart
    says: str  # what else does, such as "has the weights of layer 3"


class Theirs(Notes):
    """Notes that put theirs in the place of ours, but where either is not finite."""

    def __init__(self, wanted: Collection[str], theirs: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(wanted, False)
        self.theirs = theirs

    def value(self, name: str, x: Any, mapped: Sequence[int]) -> Any:
        """Theirs, with the axes of `vmap` where they are in ours."""
        self.add(name, x, mapped)
        ours, place = self.found[name][-1], len(self.found[name]) - 1
        theirs = self.theirs[name][place] if place < len(self.theirs[name]) else None
        if theirs is None or theirs.shape != ours.shape:
            return x
        given = np.where(np.isfinite(theirs) & np.isfinite(ours), theirs, ours)
        for place, axis in reversed([*enumerate(reversed(mapped))]):
            given = np.moveaxis(given, place, place + axis)
        return jnp.asarray(given, x.dtype)


def functions_noted(words: Sequence[Words], notes: Notes) -> Any:
    """The library with a bug's words, and with those notes that these leave a place for."""
    kept = [*words]
    for row in NOTES:
        try:
            rewritten([*kept, *row])
        except ValueError:
            continue
        kept += row
    return variant(kept, {"note": notes.note, "through": through})


def by_token(x: Float[np.ndarray, "..."]) -> Rows:
    """A row for each token; −∞ of masked scores as 0."""
    x = np.where(np.isneginf(x), 0, x.astype(np.float64))
    return np.moveaxis(x, -2, 0).reshape(x.shape[-2], -1)


def shaken(x: Any) -> Any:
    """float32 numbers, each off by about half a rounding."""
    random: Any = np.random.RandomState(0)
    return x * (1 + 2.0**-24 * random.standard_normal(x.shape)).astype(np.float32)


def worth(found: Explained, left: Collection[Place]) -> tuple[float, float]:
    """How much a bug explains of what is left to be explained, and how near."""
    fits, broken = found
    errors = [fit.error for place, fit in fits.items() if place in left]
    return len(errors) - len(broken) / 2, -max(errors, default=0.0)


class Steps:
    """Their activations, under `trace`'s names, beside a model's candidates."""

    def __init__(self, candidates: Candidates, theirs: Mapping[str, Float[np.ndarray, "..."]]) -> None:
        self.candidates, self.given = candidates, theirs
        self.layers = [*range(candidates.config.layers)]
        self.ends = ["embed", *(f"layers.{i}.out" for i in self.layers)]  # each layer's input, and the last's answer
        self.theirs = {place_of(name): by_token(x) for name, x in theirs.items()}
        self.right, again = self.of(SAME, self.layers), self.of(SAME, self.layers, again=True)
        least = ROUNDING[candidates.dtype]
        self.rounding = {place: max(least, distance(again[place], x).whole) for place, x in self.right.items()}
        self.errors = {place: distance(self.theirs[place], x).whole for place, x in self.right.items()}
        self.wrong = {place for place, e in self.errors.items() if NEAR * self.rounding[place] < e < np.inf}

    def of(self, bug: Bug, layers: Sequence[int], again: bool = False) -> dict[Place, Rows]:
        """What a Llama with a bug computes from their inputs at each place, in some layers; or that with other
        roundings: of all numbers, or of a computation in their dtype."""
        llama, config = self.candidates.llama(bug), self.candidates.config
        if len(llama.params.blocks) != config.layers or len(llama.tokens) != len(self.candidates.tokens):
            return {}  # no place there is one here
        given = {name: [self.given.get(f"layers.{i}.{name}") for i in layers] for name in IN_LAYERS}
        inputs = [self.given.get(self.ends[i]) for i in [*layers, layers[-1] + 1]]
        given |= {"embed": inputs[:1], "out": inputs[1:], "norm": [self.given.get("norm")]}
        params = llama.params._replace(blocks=tuple(llama.params.blocks[i] for i in layers))
        if again and self.candidates.dtype == "float32":
            params = jax.tree.map(shaken, params)
            given = {name: [x if x is None else shaken(x) for x in arrays] for name, arrays in given.items()}
        elif again:
            params = jax.tree.map(lambda w: w.astype(self.candidates.dtype), params)
        notes = Theirs({"embed", "out", *(name for name, _ in self.theirs)} - {"logits"}, given)
        functions = functions_noted(bug.words, notes)
        rows = functions.logits(params, llama.tokens, unchecked(llama.config, {"layers": len(layers)}))
        found: dict[Place, Any] = {
            (name, layers[i]): x for name in IN_LAYERS for i, x in enumerate(notes.found.get(name, []))
        }
        if layers[0] == 0:
            found["embed", None] = notes.found["embed"][0]
        if layers[-1] == self.layers[-1]:
            found |= dict(zip([("norm", None)], notes.found.get("norm", []), strict=False))
            found["logits", None] = np.asarray(rows.astype(jnp.float32))[:, self.candidates.columns]
        rows = {place: by_token(x) for place, x in found.items() if place in self.theirs}
        return {place: x for place, x in rows.items() if x.shape == self.theirs[place].shape}

    def some(self, places: Collection[Place], count: int) -> list[int]:
        """Layers that show some places: of each step a few, beside those at the ends; all, if a layer's input is not
        known."""
        layers = set[int]()
        for step in {step for step, _ in places}:
            mine = sorted(layer for name, layer in places if name == step and layer is not None)
            layers |= {0} if step == "embed" else {self.layers[-1]} if step in ONCE else {*mine[:count]}
        known = all(self.ends[i] in self.given for i in layers)
        return sorted(layers) if known else self.layers

    def explained(self, bug: Bug, layers: Sequence[int]) -> Explained:
        """The wrong places that a bug explains in some layers, and those beside them that are right without it."""
        fits, broken = dict[Place, Fit](), list[Place]()
        for place, rows in self.of(bug, layers).items():
            n = self.rounding[place]
            if place not in self.wrong:
                broken += [place] * (distance(self.theirs[place], rows).whole > NEAR * n)
                continue
            fit = measured(self.theirs[place], bug, rows, self.right[place], Distance(n, n), n)
            if fit.near and fit.whole and fit.effect > ALONG * n:
                fits[place] = fit
        mine = {layer for _, layer in fits}
        return fits, [place for place in broken if place[1] in mine]

    def first(self) -> int | None:
        """The position from which on a step is wrong."""
        ends = list[int]()
        for place in self.wrong:
            rows = by_row(self.theirs[place], self.right[place])
            ends += [t for t, e in enumerate(rows) if NEAR * self.rounding[place] < e < np.inf][:1]
        return min(ends, default=None)

    def judge(self) -> list[Step]:
        """Each wrong step and what explains it: again and again the bug that explains the most of those that are left,
        and breaks the fewest."""
        left: set[Place] = set(self.wrong)
        found = list[Step]()
        tried, seen = dict[str, Explained](), set[int]()
        while left:
            most = max((worth(one, left) for one in tried.values()), default=(0.0, 0.0))[0]
            if most <= 0:
                layers = self.some(left, 1)
                if seen >= set(layers):
                    break
                tried, seen = self.tried(layers), seen | set(layers)
                continue
            layers = self.some(left, len(self.layers))
            best = {name: self.explained(BUGS[name], layers) for name in tried if worth(tried[name], left)[0] == most}
            names = sorted(best, key=lambda name: worth(best[name], left), reverse=True)
            fits = {place: fit for place, fit in best[names[0]][0].items() if place in left}
            if not fits:
                break
            names = [name for name in names if self.alike(name, names[0], fits, best)]
            others = self.others(fits) if best[names[0]][1] else []  # a change of that step alone comes before
            found += others if all(step.says for step in others) and others else self.told(fits, names, fits)
            left -= set(fits)
        return sorted([*found, *self.others(left)], key=lambda step: (step.layers, IN_ORDER.index(step.step)))

    def tried(self, layers: Sequence[int]) -> dict[str, Explained]:
        """What each bug that this model can have explains and breaks in some layers."""
        bugs = [bug for bug in BUGS.values() if not bug.fits or bug.fits(self.candidates.config)]
        found = dict[str, Explained]()
        with progress("steps", len(bugs), " bugs") as tell:
            for bug in bugs:
                found[bug.name] = self.explained(bug, layers)
                tell(1)
        return found

    def alike(self, name: str, best: str, mine: Collection[Place], tried: Mapping[str, Any]) -> bool:
        """Whether a bug explains what the best one does, and is not told apart from it there."""
        if name == best:
            return True
        fits, broken = tried[name]
        if not set(mine) <= fits.keys() or len(broken) > len(tried[best][1]):
            return False
        layers = self.some(mine, len(self.layers))
        a, b = self.of(BUGS[best], layers), self.of(BUGS[name], layers)
        both = a.keys() & b.keys() & set(mine)
        return not any(ruled_out(self.theirs[place], a[place], b[place], self.rounding[place]) for place in both)

    def told(
        self, places: Collection[Place], names: list[str], fits: Mapping[Place, Fit], says: str = ""
    ) -> list[Step]:
        """A step for each name of some places."""
        steps = dict[str, list[Place]]()
        for place in sorted(places, key=lambda place: place[1] or 0):
            steps.setdefault(place[0], []).append(place)
        found = list[Step]()
        for step, mine in steps.items():
            error = max(self.errors[place] for place in mine)
            left = max(fits[place].error for place in mine) if fits else error
            layers = [layer for _, layer in mine if layer is not None]
            found.append(Step(step, layers, error, left, names, says))
        return found

    def others(self, places: Collection[Place]) -> list[Step]:
        """Wrong steps that no known bug explains: scaled, or with other weights of the model."""
        by_words = dict[tuple[str, str], set[Place]]()
        for place in places:
            by_words.setdefault((place[0], self.says(place)), set()).add(place)
        return [step for (_, says), mine in by_words.items() for step in self.told(mine, [], {}, says)]

    def says(self, place: Place) -> str:
        """What explains a wrong step that no known bug does, if anything."""
        (step, layer), n, theirs, ours = place, self.rounding[place], self.theirs[place], self.right[place]
        factor = float((theirs * ours).sum() / max((ours**2).sum(), 1e-300))
        if not theirs.any():
            return "is zero"
        if distance(theirs, factor * ours).whole <= NEAR * n:
            return f"is multiplied by {factor:.4g}"
        if layer is None or step not in WEIGHTS:
            return ""
        mine = [(layer, where, order) for where in WEIGHTS.values() for order in ORDERS if where != WEIGHTS[step]]
        for other, where, order in [*mine, *((i, WEIGHTS[step], "") for i in self.layers if i != layer)]:
            if not self.shaped(step, where) or (order and where not in ("attn.q", "attn.k")):
                continue
            bug = Bug("other weights", "", "", params=taking(WEIGHTS[step], layer, where, other, ORDERS[order]))
            rows = self.of(bug, self.some([place], 1)).get(place)
            if rows is not None and distance(theirs, rows).whole <= NEAR * n:
                return f"has the weights of {where}{order}" if other == layer else f"has the weights of layer {other}"
        return ""

    def shaped(self, step: str, where: str) -> bool:
        """Whether a step's weights and some others have one shape."""
        block = self.candidates.params.blocks[0]
        return weights(block, WEIGHTS[step]).size == weights(block, where).size


def weights(block: Any, where: str) -> Any:
    """A layer's weights by their name."""
    for name in where.split("."):
        block = getattr(block, name)
    return block


def taking(
    where: str, layer: int, source: str, other: int, order: Callable[[Any], Any]
) -> Callable[[Params, Any], Params]:
    """A change of parameters: one layer's weights taken from elsewhere."""

    def put(block: Any, names: list[str], value: Any) -> Any:
        new = put(getattr(block, names[0]), names[1:], value) if names[1:] else value
        return block._replace(**{names[0]: new})

    def change(params: Params, _: Any) -> Params:
        blocks = [*params.blocks]
        value = order(weights(blocks[other], source)).reshape(weights(blocks[layer], where).shape)
        blocks[layer] = put(blocks[layer], where.split("."), value)
        return params._replace(blocks=tuple(blocks))

    return change


IN_ORDER = ["embed", *IN_LAYERS, "norm", "logits"]


def place_of(name: str) -> Place:
    """A step and its layer, by a name of `trace`'s."""
    prefix, _, step = name.rpartition(".")
    return step, int(prefix.partition(".")[2]) if prefix else None
