"""What a model with each known bug computes on some tokens, and how much of that is rounding."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lovely_llama import Config, Params

from ..formats.model import DTYPES, Model
from .bugs import BOS, BUGS, Bug, Llama, with_bug
from .bugs.bug import Tokens, through
from .variants import library

COLUMNS = 512  # of the vocabulary, which judge as well as all
Rows = Float[np.ndarray, "_ columns"]
Told = Bool[np.ndarray, "seq vocab"]
SAME = Bug("same", "is right", "nothing")


class Candidates:
    """A model's logits on tokens, with one bug or none, in float32 with the weights rounded to another's dtype."""

    def __init__(
        self, params: Params, config: Config, tokens: Tokens, dtype: str, bos: int, told: Told | None = None
    ) -> None:
        self.params = jax.tree.map(lambda w: through(jnp.asarray(w, jnp.float32), DTYPES[dtype]), params)
        self.config, self.tokens, self.dtype, self.bos = config, tokens, dtype, bos
        self.columns = np.unique(np.linspace(0, config.vocab - 1, min(COLUMNS, config.vocab)).astype(int))
        self.told = told  # of log-probabilities: where theirs are known
        if told is not None:
            few = min(COLUMNS, int(told.sum(axis=1).max()))
            self.picked = np.argsort(~told, axis=1, kind="stable")[:, :few]
        self.offsets: Int[np.ndarray, " _"] | None = None  # from the end: positions that are compared; None: all
        self.known, self.noises = dict[str, Rows](), dict[str, Distance]()
        self.order = (
            np.random.RandomState(0).permutation(config.dim),
            np.random.RandomState(1).permutation(config.hidden_dim),
        )

    def of(self, bug: Bug) -> Rows:
        """The logits with a bug."""
        if bug.name not in self.known:
            self.known[bug.name] = self.read(self.llama(bug))
        return self.known[bug.name]

    def again(self, bug: Bug) -> Rows:
        """The same function with other roundings: in float32 with every sum in another order, by renumbering the axes
        dim and hidden_dim once the bug is in; in 16 bits by computing in them."""
        llama = self.llama(bug)
        if self.dtype == "float32":
            return self.read(llama._replace(params=renumbered(llama.params, *self.order)))
        return self.read(llama._replace(params=jax.tree.map(lambda w: w.astype(self.dtype), llama.params)))

    def noise(self, bug: Bug) -> "Distance":
        """How far these two are apart."""
        if bug.name not in self.noises:
            self.noises[bug.name] = distance(self.again(bug), self.of(bug))
        return self.noises[bug.name]

    def all(self, tell: Callable[[int], object]) -> dict[str, Rows]:
        """The logits with each bug that this model can have. Two at a time, as compiling leaves a core idle."""
        library()  # before threads begin: Python 3.11 parses in one at a time

        def one(bug: Bug) -> Rows:
            rows = self.of(bug)
            tell(1)
            return rows

        bugs = [bug for bug in BUGS.values() if not bug.fits or bug.fits(self.config)]
        with ThreadPoolExecutor(2) as pool:
            return dict(zip([bug.name for bug in bugs], pool.map(one, bugs), strict=True))

    def llama(self, bug: Bug) -> Llama:
        """The model with a bug."""
        return with_bug(bug, self.params, self.tokens, self.config, self.bos)

    def read(self, llama: Llama) -> Rows:
        """The columns that are compared, of logits or log-probabilities."""
        logits = llama.logits().astype(jnp.float32)
        return self.at(self.cut(np.asarray(logits if self.told is None else jax.nn.log_softmax(logits))))

    def at(self, rows: Rows) -> Rows:
        """The positions that are compared."""
        return rows if self.offsets is None else rows[[i for i in self.offsets if i + len(rows) >= 0]]

    def cut(self, rows: Float[np.ndarray, "_ vocab"]) -> Rows:
        """The columns that are compared: of log-probabilities those that theirs tell of each position, else some."""
        if self.told is None:
            return rows[:, self.columns].astype(np.float64)
        count = min(len(rows), len(self.picked))
        picked, told = (x[len(x) - count :] for x in (self.picked, self.told))
        cut = np.take_along_axis(rows[len(rows) - count :].astype(np.float64), picked, axis=1)
        known = np.take_along_axis(told, picked, axis=1)
        return np.where(known.any(axis=1, keepdims=True), np.where(known, cut, 0), np.nan)

    def count(self, bug: Bug) -> int:
        """How many rows a bug gives."""
        return len(self.llama(bug).tokens)

    @cached_property
    def right(self) -> Rows:
        """The right logits at every position."""
        return self.of(SAME)

    @cached_property
    def roundings(self) -> list[float]:
        """How much of each position's logits is rounding; at least that of the median one."""
        again = self.again(SAME)
        return [max(row, distance(again, self.of(SAME)).median) for row in by_row(again, self.of(SAME))]


KEPT = list[tuple[Model, Any, Candidates]]()  # the last few, for whoever mends a program and compares it again


def candidates_of(model: Model, tokens: Tokens, dtype: str, told: Told | None = None) -> Candidates:
    """The candidates of a model, which keep what they have computed."""
    key = dtype, tokens.tolist(), told is None or told.tolist()
    for known, asked, made in KEPT:
        if known is model and asked == key:
            return made
    made = Candidates(model.params, model.config, tokens, dtype, bos_of(model), told)
    KEPT[:] = [*KEPT, (model, key, made)][-2:]
    return made


def bos_of(model: Model) -> int:
    """The id of BOS, or what it is in most models."""
    given = model.tokenizer and model.tokenizer.bos
    return min(BOS, model.config.vocab - 1) if given is None else given


def renumbered(params: Params, dim: Any, hidden_dim: Any) -> Params:
    """The same model with its axes dim and hidden_dim in another order."""

    def each(path: tuple[Any, ...], w: Array) -> Array:
        name = path[-1].name
        if name in ("gate", "up"):
            return w[hidden_dim][:, dim]
        if name == "down":
            return w[dim][:, hidden_dim]
        return w[dim] if name == "o" else w[..., dim]

    return jax.tree.map_with_path(each, params)


class Distance(NamedTuple):
    """How far two sets of rows are apart: ‖a − b‖ / ‖b‖ over all, and of the median row."""

    whole: float
    median: float


def aligned(*sets: Rows) -> list[Rows]:
    """The last rows that all have, without those in which any is not finite."""
    count = min(map(len, sets))
    cut = [rows[len(rows) - count :] for rows in sets]
    finite = np.all([np.isfinite(rows).all(axis=1) for rows in cut], axis=0)
    return [rows[finite] for rows in cut]


def distance(a: Rows, b: Rows) -> Distance:
    """Between rows that both have; infinite where there is none."""
    a, b = aligned(a, b)
    if not len(a):
        return Distance(np.inf, np.inf)
    each = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-300)
    return Distance(float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-300)), float(np.median(each)))


def by_row(a: Rows, b: Rows) -> list[float]:
    """The distance of each of the last rows that both have."""
    count = min(len(a), len(b))
    ends = zip(a[len(a) - count :], b[len(b) - count :], strict=True)
    return [distance(x[None], y[None]).whole for x, y in ends]


def correlation(a: Rows, b: Rows) -> float:
    """Of the numbers of two sets of rows, each row less its mean."""
    x, y = (rows - rows.mean(axis=1, keepdims=True) for rows in aligned(a, b))
    return float((x * y).sum() / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-300))


def slope(of: Rows, on: Rows, base: Rows) -> tuple[float, float]:
    """The slope of `of` − base on `on` − base, and five times its deviation by the jackknife over positions."""
    of, on, base = aligned(of, on, base)
    products, squares = ((of - base) * (on - base)).sum(axis=1), ((on - base) ** 2).sum(axis=1)
    total = squares.sum()
    if not total > 0:
        return np.nan, np.inf
    whole, count = products.sum() / total, len(products)
    rest = total - squares
    left_out = (products.sum() - products)[rest > 0] / rest[rest > 0]
    σ = float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))
    return float(whole), 5 * σ
