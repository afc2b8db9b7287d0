"""The optimiser step as one compiled program, for a whole model or for adapters; and its state by name in files."""

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

from ..devices.partition import is_stacked, specs
from ..devices.programs import Program
from ..fast import accumulate, loss
from ..fast.layers import stack
from ..formats.layout import HUGGING_FACE, all_tensors, from_named, to_arrays
from ..formats.model import DTYPES

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class StepOptions(NamedTuple):
    """The hyperparameters that are compiled into the step."""

    config: Config
    micro_batch: int
    clip: float
    weight_decay: float
    betas: tuple[float, float]
    dtype: str
    remat: str
    scale: float  # of adapters: α/r


class TrainState(NamedTuple):
    """Parameters and moments: of a model whose layers are stacked, or of adapters on a frozen base."""

    base: Params | None
    trained: Any  # Params; or a Block with an Adapter in place of each matrix that has one, and None elsewhere
    moments: Moments


class StepMetrics(NamedTuple):
    """What a step measures."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]  # before clipping
    finite: Bool[Array, ""]  # whether both are; otherwise the step is skipped


# ---- The programs ----------------------------------------------------------------------------------------------------


def merged(base: Params | None, trained: Any, scale: float) -> Params:
    """The parameters of the whole model."""
    if base is None:
        return trained
    return base._replace(blocks=jax.vmap(partial(adapt, scale=scale))(cast(Any, base.blocks), trained))


def loss_of(base: Params | None, trained: Any, rows: tuple[Array, ...], options: StepOptions) -> Float[Array, ""]:
    """The loss of a batch: tokens, targets and, in packed sequences, the start of each token's document."""
    tokens, targets, *first = rows
    params = merged(base, trained, options.scale)
    return loss(params, tokens, targets, options.config, *first, keep=options.remat, dtype=DTYPES[options.dtype])


@partial(Program, static_argnames="options")
def batch_loss(base: Params | None, trained: Any, rows: tuple[Array, ...], options: StepOptions) -> Float[Array, ""]:
    """`loss_of`, compiled, for evaluations."""
    return loss_of(base, trained, rows, options)


@partial(Program, static_argnames="options", donate_argnames=("trained", "moments"))
def step(
    base: Params | None,
    trained: Any,
    moments: Moments,
    rate: Float[Array, ""],
    rows: tuple[Array, ...],
    options: StepOptions,
) -> tuple[Any, Moments, StepMetrics]:
    """Accumulate gradients over micro-batches, clip, and apply AdamW. If they are not finite, nothing changes."""

    def objective(trained: Any, *rows: Array) -> Float[Array, ""]:
        return loss_of(base, in_place(trained, options.config), rows, options)

    # Each micro-batch takes rows from all parts of the batch, and so from every device.
    micro = [ids.reshape(options.micro_batch, -1, ids.shape[-1]).swapaxes(0, 1) for ids in rows]
    value, gradients = accumulate(objective, trained, *micro)
    gradients, norm = clip(gradients, options.clip)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    new = adamw(trained, gradients, moments, rate, options.weight_decay, options.betas)
    chosen = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (trained, moments))
    trained, moments = (in_place(tree, options.config) for tree in chosen)
    return trained, moments, StepMetrics(value, norm, finite)


def in_place(tree: Any, config: Config) -> Any:
    """On a mesh, constrain every model in a tree, and so its gradient, to the sharding of its parameters.

    Everything else, such as adapters, is replicated.
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


# ---- The state -------------------------------------------------------------------------------------------------------


def stacked(params: Params) -> Params:
    """The parameters with layers stacked on axis 0, copied, so that a step may donate their buffers."""
    blocks = params.blocks if is_stacked(params) else stack(params.blocks)
    return jax.tree.map(jnp.array, params._replace(blocks=blocks))


@partial(jax.jit, static_argnames=("config", "scale"))
def new_params(rng: Key[Array, ""], config: Config, scale: float = 1.0) -> Params:
    """Initial parameters, matrices scaled. One program, since compiling it per array would take longer."""
    new = stacked(init(rng, config))
    return jax.tree.map_with_path(lambda path, w: w if path[-1].name in GAINS else scale * w, new)


def new_adapters(rng: Key[Array, ""], blocks: Block, rank: int, names: Sequence[str]) -> Any:
    """Adapters for the named matrices of stacked layers: A random, B zero, so that the model starts unchanged.

    Hu et al. 2021, arXiv:2106.09685, §4.1. The variance of A is 1 / its number of inputs.
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


def parts_of(state: TrainState) -> dict[str, Any]:
    """The trees that a checkpoint holds besides the model, by name."""
    adapters = {} if state.base is None else {"adapters": state.trained}
    return {**adapters, "first": state.moments.first, "second": state.moments.second}


def to_stored(state: TrainState, config: Config) -> dict[str, Float[np.ndarray, "..."]]:
    """The moments, and the adapters if there are any, as arrays by name."""
    stored = dict[str, Float[np.ndarray, "..."]]()
    for part, tree in parts_of(state).items():
        arrays = to_arrays(HUGGING_FACE, tree, config) if isinstance(tree, Params) else None
        flat = arrays or dict(zip(names_of(tree, config), (np.ravel(leaf) for _, leaf in leaves(tree)), strict=True))
        stored |= {f"{part}.{name}": array for name, array in flat.items()}
    return stored


def from_stored(
    state: TrainState, params: Params, arrays: Mapping[str, Any], updates: int, config: Config, file: object
) -> TrainState:
    """The state with these arrays and the structure of `state`; `params` is the whole model."""
    parts = parts_of(state)
    wanted = {f"{part}.{name}": size for part, tree in parts.items() for name, size in names_of(tree, config).items()}
    check_tensors(wanted, {name: array.shape for name, array in arrays.items()}, file)

    def tree_of(part: str, like: Any) -> Any:
        if isinstance(like, Params):
            return stacked(from_named(HUGGING_FACE, lambda name: arrays[f"{part}.{name}"], config))
        found = [arrays[f"{part}.{name}"] for name in names_of(like, config)]
        shaped = [jnp.array(flat.reshape(leaf.shape)) for flat, leaf in zip(found, jax.tree.leaves(like), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(like), shaped)

    read = {part: tree_of(part, tree) for part, tree in parts.items()}
    trained = stacked(params) if state.base is None else read["adapters"]
    return TrainState(state.base, trained, Moments(jnp.array(updates), read["first"], read["second"]))


def initial_state(base: Params | None, trained: Any) -> TrainState:
    """The state before the first step."""
    return TrainState(base, trained, moments(trained))
