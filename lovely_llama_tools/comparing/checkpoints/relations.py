"""What a tensor of another model may be to one of ours, and samples by which it is sought among them."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float

from lovely_llama import Attention, Config, FeedForward

from ...formats.model import Model
from ..bugs.attention import is_grouped
from ..bugs.bug import halves, neighbours, other_way
from ..bugs.layers import deinterleaved, interleaved
from ..bugs.rotary import by_number_of_heads, divides
from .values import Matrix

SAMPLE = 1024  # numbers of a tensor by which it is sought among ours
LIKELY = 0.9  # the correlation of samples from which the whole is compared
Place = tuple[int | None, str]  # a layer, if in one, and a field
Get = Callable[[str], Array]  # the tensors of a layer by their fields


class Relation(NamedTuple):
    """A tensor made from ours."""

    name: str
    fields: str  # of ours that it may be made from
    of: Callable[[Get, str, Config], Array]  # the layer's tensors, and the field
    fits: Callable[[Config], bool] = lambda config: True


def within_heads(*changes: Callable[[Array], Array]) -> Callable[[Get, str, Config], Array]:
    """Changes, one after the other, of the rows that belong to heads, which in o are columns."""

    def of(get: Get, field: str, _: Config) -> Array:
        rows = jnp.moveaxis(get(field), 0, -1) if field == "o" else get(field)
        for change in changes:
            rows = change(rows)
        return jnp.moveaxis(rows, -1, 0) if field == "o" else rows

    return of


def unchanged(get: Get, field: str, _: Config) -> Array:
    return get(field)


def back(q: Array) -> Array:
    """The inverse of `other_way`."""
    return q.swapaxes(0, 1).reshape(q.shape)


def across(get: Get, field: str, _: Config) -> Array:
    """The transpose of a matrix, in the shape that the matrix has."""
    w = get(field)
    return (w.reshape(len(w), -1) if field == "o" else w.reshape(-1, w.shape[-1])).T.reshape(w.shape)


def across_halves(get: Get, field: str, config: Config) -> Array:
    return neighbours(across(lambda name: halves(get(name)), field, config))


def by_queries(get: Get, field: str, config: Config) -> Array:
    k = get(field)
    return by_number_of_heads(Attention(k, k, k, k), config).k


def fused(change: Callable[[Any, Config], Any]) -> Callable[[Get, str, Config], Array]:
    """A change of gate and up together."""
    return lambda get, field, c: getattr(change(FeedForward(get("gate"), get("up"), get("up")), c), field)


RELATIONS = (
    Relation("", "attn_norm q k v o ffn_norm gate up down embed norm unembed", unchanged),
    Relation("rows in Hugging Face's order", "q k v", within_heads(halves)),
    Relation("rows permuted back once more", "q k v", within_heads(neighbours)),
    Relation("rows permuted twice", "q k v", within_heads(halves, halves)),
    Relation("rows permuted back twice more", "q k v", within_heads(neighbours, neighbours)),
    Relation("rows permuted by the number of query heads", "k", by_queries, divides),
    Relation("columns in Hugging Face's order", "o", within_heads(halves)),
    Relation("columns permuted back", "o", within_heads(neighbours)),
    Relation("heads grouped the other way", "q o", within_heads(other_way), is_grouped),
    Relation("heads grouped the other way, back", "q o", within_heads(back), is_grouped),
    Relation("transposed", "q k v o gate up down", across),
    Relation("transposed in Hugging Face's order", "q k", across_halves),
    Relation("every other row of gate above up", "gate up", fused(interleaved)),
    Relation("half of the rows of gate and up in turns", "gate up", fused(deinterleaved)),
)


class Candidate(NamedTuple):
    """One of our tensors in another's place, and how it is changed."""

    layer: int | None
    field: str
    relation: Relation


Samples = dict[tuple[int, ...], tuple[list[Candidate], Matrix]]


def tensors_of(model: Model) -> dict[Place, Array]:
    """All tensors; a tied model's unembedding too."""
    embed, blocks, norm, unembed = model.params
    found: dict[Place, Array] = {(None, "embed"): embed}
    for i, block in enumerate(blocks):
        parts = {**block._asdict(), **block.attn._asdict(), **block.ffn._asdict()}
        found |= {(i, field): w for field, w in parts.items() if field not in ("attn", "ffn")}
    return found | {(None, "norm"): norm, (None, "unembed"): embed if unembed is None else unembed}


def matrix(field: str, array: Array) -> Matrix:
    """A tensor as a matrix in float32, a gain as its one column."""
    plain = np.asarray(array).astype(np.float32, copy=False)
    return plain.reshape((len(plain), -1) if field == "o" or plain.ndim == 1 else (-1, plain.shape[-1]))


@cache
def positions(size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where a tensor is sampled."""
    return np.arange(size) if size <= SAMPLE else np.random.default_rng(0).integers(size, size=SAMPLE)


def sampled(ours: dict[Place, Array], config: Config) -> Samples:
    """Samples of all candidates, each less its mean and of unit norm, by the shape of their matrices.

    Relations are applied once, to the numbers of a layer's elements, which tell where each sample is to be found."""
    layer = {field: array for (i, field), array in ours.items() if i == 0}
    ends = np.cumsum([0, *(array.size for array in layer.values())])
    found = dict[tuple[int, ...], tuple[list[Candidate], list[Any]]]()

    def numbered(field: str) -> Array:
        begin, shape = ends[[*layer].index(field)], layer[field].shape
        return jnp.asarray(np.arange(begin, begin + math.prod(shape), dtype=np.int32).reshape(shape))

    def add(i: int | None, field: str, relation: Relation, sample: Float[np.ndarray, " n"]) -> None:
        candidates, rows = found.setdefault(matrix_shape(field, ours[i, field].shape), ([], []))
        candidates.append(Candidate(i, field, relation))
        rows.append(unit(sample))

    for relation in (r for r in RELATIONS if r.fits(config)):
        for field in relation.fields.split():
            if field not in layer:
                array = ours[None, field]
                add(None, field, relation, np.asarray(array).reshape(-1)[positions(array.size)].astype(np.float32))
                continue
            at = np.asarray(relation.of(numbered, field, config)).reshape(-1)[positions(layer[field].size)]
            part = np.searchsorted(ends, at, "right") - 1
            for i in range(config.layers):
                sample = np.zeros(len(at), np.float32)
                for n in np.unique(part):
                    sample[part == n] = np.asarray(ours[i, [*layer][n]]).reshape(-1)[at[part == n] - ends[n]]
                add(i, field, relation, sample)
    return {shape: (candidates, np.stack(rows)) for shape, (candidates, rows) in found.items()}


def matrix_shape(field: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `matrix`."""
    rows = shape[0] if field == "o" or len(shape) == 1 else math.prod(shape[:-1])
    return rows, math.prod(shape) // rows


def unit(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """x less its mean, of unit norm; 0 if constant."""
    x = np.nan_to_num(x, posinf=0, neginf=0)
    centred = x - x.mean()
    return centred / max(float(np.linalg.norm(centred)), 1e-30)


def likely(theirs: Matrix, place: Place, samples: Samples) -> list[list[Candidate]]:
    """What of ours theirs may be, the likeliest first, at most three; each with others that are the same tensor.

    Gains are alike: for them the nearest are returned, however far."""
    candidates, rows = samples.get(theirs.shape, ([], np.zeros((0, 1), np.float32)))
    fit = np.abs(rows @ unit(theirs.reshape(-1)[positions(theirs.size)])) if candidates else np.zeros(0)

    def rank(n: int) -> tuple[float, bool, bool, int]:
        return -round(float(fit[n]), 4), candidates[n].layer != place[0], candidates[n].field != place[1], n

    found = [n for n in sorted(range(len(candidates)), key=rank)[:3] if theirs.shape[1] == 1 or fit[n] >= LIKELY]
    return [
        [c for c, row in zip(candidates, rows, strict=True) if c[:2] == candidates[n][:2] and (row == rows[n]).all()]
        for n in found
    ]
