"""One step of training as one compiled program: of a whole model, or of adapters on one; and both by name in files."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Key

from lovely_llama import (
    GAINS,
    Adapter,
    Block,
    Config,
    Moments,
    Params,
    adamw,
    adapt,
    check_tensors,
    clip,
    init,
    moments,
)

from .devices.partition import specs
from .fast import accumulate, loss
from .fast.layers import is_stacked, stack
from .formats import DTYPES
from .layout import HUGGING_FACE, all_tensors, from_named, to_arrays

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class Recipe(NamedTuple):
    """What is compiled into the step."""

    config: Config
    micro_batch: int
    clip: float
    weight_decay: float
    betas: tuple[float, float]
    dtype: str
    remat: str
    scale: float  # of adapters: α/r


class Learner(NamedTuple):
    """What is trained: a model whose layers are stacked, or adapters on the base, which stays as it is."""

    base: Params | None
    trained: Any  # Params; or a Block with an Adapter in place of each matrix that has one, and None elsewhere
    moments: Moments


class Report(NamedTuple):
    """What a step says of itself."""

    loss: Float[Array, ""]
    norm: Float[Array, ""]  # of the gradient, before it is clipped
    good: Bool[Array, ""]  # whether both were finite: else the step is skipped


# ---- The programs ----------------------------------------------------------------------------------------------------


def merged(base: Params | None, trained: Any, scale: float) -> Params:
    """The parameters of the whole model."""
    if base is None:
        return trained
    return base._replace(blocks=jax.vmap(partial(adapt, scale=scale))(cast(Any, base.blocks), trained))


def loss_of(base: Params | None, trained: Any, rows: tuple[Array, ...], recipe: Recipe) -> Float[Array, ""]:
    """The loss of a batch: tokens, targets and, where rows are packed, where each token's document begins."""
    tokens, targets, *first = rows
    params = merged(base, trained, recipe.scale)
    return loss(params, tokens, targets, recipe.config, *first, keep=recipe.remat, dtype=DTYPES[recipe.dtype])


@partial(jax.jit, static_argnames="recipe")
def batch_loss(base: Params | None, trained: Any, rows: tuple[Array, ...], recipe: Recipe) -> Float[Array, ""]:
    """The same as a program, for evaluations."""
    return loss_of(base, trained, rows, recipe)


@partial(jax.jit, static_argnames="recipe", donate_argnames=("trained", "moments"))
def step(
    base: Params | None, trained: Any, moments: Moments, rate: Float[Array, ""], rows: tuple[Array, ...], recipe: Recipe
) -> tuple[Any, Moments, Report]:
    """Gradients, micro-batch by micro-batch, clipped, into AdamW. If they are not finite, nothing changes."""

    def objective(trained: Any, *rows: Array) -> Float[Array, ""]:
        return loss_of(base, in_place(trained, recipe.config), rows, recipe)

    # Each micro-batch has rows from all parts of the batch, and thus from every device.
    micro = [ids.reshape(recipe.micro_batch, -1, ids.shape[-1]).swapaxes(0, 1) for ids in rows]
    value, gradients = accumulate(objective, trained, *micro)
    gradients, norm = clip(gradients, recipe.clip)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    new = adamw(trained, gradients, moments, rate, recipe.weight_decay, recipe.betas)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, (trained, moments))
    trained, moments = (in_place(tree, recipe.config) for tree in kept)
    return trained, moments, Report(value, norm, good)


def in_place(tree: Any, config: Config) -> Any:
    """On a mesh of devices, whole models within a tree, and so their derivatives, split as their parameters are.

    All else, such as adapters, lies whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    parts = specs(config, dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True)))
    blocks = jax.tree.map(lambda spec: PartitionSpec(None, *spec), parts.blocks[0])

    def split(node: Any) -> Any:
        place = parts._replace(blocks=blocks) if isinstance(node, Params) else PartitionSpec()
        return jax.lax.with_sharding_constraint(node, place)

    return jax.tree.map(split, tree, is_leaf=lambda node: isinstance(node, Params))


# ---- What is trained -------------------------------------------------------------------------------------------------


def stacked(params: Params) -> Params:
    """The parameters with their layers on an axis, each in memory of its own, which a step may take over."""
    blocks = params.blocks if is_stacked(params) else stack(params.blocks)
    return jax.tree.map(jnp.array, params._replace(blocks=blocks))


@partial(jax.jit, static_argnames=("config", "scale"))
def new_params(rng: Key[Array, ""], config: Config, scale: float = 1.0) -> Params:
    """Parameters to train from, matrices scaled, in one program: value by value it would take longer."""
    new = stacked(init(rng, config))
    return jax.tree.map_with_path(lambda path, w: w if path[-1].name in GAINS else scale * w, new)


def new_adapters(rng: Key[Array, ""], blocks: Block, rank: int, names: Sequence[str]) -> Any:
    """Adapters for these matrices of stacked layers: a random, b zero, so that at first nothing changes.

    Hu et al. 2021, arXiv:2106.09685, §4.1. The variance of a is one over the length of its input.
    """

    def of(path: tuple[Any, ...], w: Array) -> Adapter | None:
        name, (layers, *axes) = path[-1].name, w.shape
        if name not in names:
            return None
        outputs, inputs = (axes[:1], axes[1:]) if name == "o" else (axes[:-1], axes[-1:])
        own = jax.random.fold_in(rng, MATRICES.index(name))
        a = jax.random.normal(own, (layers, rank, *inputs), w.dtype) / math.sqrt(math.prod(inputs))
        return Adapter(a, jnp.zeros((layers, *outputs, rank), w.dtype))

    return jax.tree.map_with_path(of, blocks)


# ---- In files --------------------------------------------------------------------------------------------------------


def names_of(tree: Any, config: Config) -> dict[str, tuple[int, ...]]:
    """The names and shapes under which parameters or adapters, or their moments, are stored."""
    if isinstance(tree, Params):
        return all_tensors(HUGGING_FACE, config)
    return {jax.tree_util.keystr(path, simple=True, separator="."): (leaf.size,) for path, leaf in leaves(tree)}


def leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(tree)


def parts_of(learner: Learner) -> dict[str, Any]:
    """The trees that a checkpoint holds besides the model, by name."""
    adapters = {} if learner.base is None else {"adapters": learner.trained}
    return {**adapters, "first": learner.moments.first, "second": learner.moments.second}


def to_stored(learner: Learner, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """The moments as arrays by name; and the adapters, where it is these that are trained."""
    stored = dict[str, Float[np.ndarray, "..."]]()
    for part, tree in parts_of(learner).items():
        arrays = to_arrays(HUGGING_FACE, tree, config) if isinstance(tree, Params) else None
        flat = arrays or dict(zip(names_of(tree, config), (np.ravel(leaf) for _, leaf in leaves(tree)), strict=True))
        stored |= {f"{part}.{name}": array for name, array in flat.items()}
    return stored


def from_stored(
    learner: Learner, params: Params, arrays: Mapping[str, Any], updates: int, config: Config, file: object
) -> Learner:
    """A learner like this one, as it was stored; `params` are those of the whole model."""
    parts = parts_of(learner)
    wanted = {f"{part}.{name}": size for part, tree in parts.items() for name, size in names_of(tree, config).items()}
    check_tensors(wanted, {name: array.shape for name, array in arrays.items()}, file)

    def tree_of(part: str, like: Any) -> Any:
        if isinstance(like, Params):
            return stacked(from_named(HUGGING_FACE, lambda name: arrays[f"{part}.{name}"], config))
        found = [arrays[f"{part}.{name}"] for name in names_of(like, config)]
        shaped = [jnp.array(flat.reshape(leaf.shape)) for flat, leaf in zip(found, jax.tree.leaves(like), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), shaped)

    read = {part: tree_of(part, tree) for part, tree in parts.items()}
    trained = stacked(params) if learner.base is None else read["adapters"]
    return Learner(learner.base, trained, Moments(jnp.array(updates), read["first"], read["second"]))


def beginner(base: Params | None, trained: Any) -> Learner:
    """A learner before its first step."""
    return Learner(base, trained, moments(trained))
