"""Saving and restoring a training state: as Hugging Face folders, or asynchronously by orbax.

Orbax's CheckpointManager would keep its own folders, steps and deletions. It neither checks the contents of files when
it reads them nor links the best step, and it knows no Hugging Face folder: so `run_folder` does this for both forms.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh

from lovely_llama import Config, Moments

from ..devices.cluster import gathered, index
from ..devices.mesh import place, places
from ..formats.hugging_face import save_description
from ..formats.model import Model
from ..formats.orbax import ORBAX, PARAMS, is_orbax, read_tree, start_writing
from ..tokens import Tokenizer
from .run_folder import Checkpoint, Progress, save_checkpoint, step_path, write_hf, writing
from .step import TrainState, from_stored, merged, parts_of, to_stored

ADAPTERS = "adapter"
STAGED = ".orbax.part"  # orbax writes here, in the run's folder, until a checkpoint is complete


class Checkpointer(AbstractContextManager["Checkpointer"]):
    """Saves checkpoints one at a time; orbax writes in the background while training goes on."""

    def __init__(
        self, run: Path, form: str, config: Config, tokenizer: Tokenizer | None, scale: float,
        fingerprints: Mapping[str, Any], last: int, beside: Callable[[Path, Any], None] | None = None,
    ) -> None:  # fmt: skip
        """`beside` writes adapters by themselves into a folder."""
        self.beside = beside
        self.run, self.form, self.config, self.tokenizer, self.scale = run, form, config, tokenizer, scale
        self.finish = partial(save_checkpoint, run, fingerprints=fingerprints, last=last)
        self.thread, self.pending = ThreadPoolExecutor(1), list[Future[None]]()

    def __exit__(self, *_: object) -> None:
        """Finish writing what has been started, however the run ends."""
        self.thread.shutdown()
        if index() == 0:
            shutil.rmtree(self.run / STAGED, ignore_errors=True)

    def save(self, state: TrainState, progress: Progress) -> None:
        """Save a checkpoint of the state as it is now. With orbax, `wait` returns when it is complete."""
        self.wait()
        path = step_path(self.run, progress.step)
        state = state if self.form == "orbax" else gathered(state)
        params = merged(state.base, state.trained, self.scale)
        tree = {PARAMS: params, **parts_of(state)}
        check_finite(path, tree)
        if self.form == "orbax":
            self.pending.append(self.thread.submit(self.start(path, tree, progress)))
        elif index() == 0:
            write = partial(write_hf, Model(self.config, params, self.tokenizer), to_stored(state, self.config))
            self.finish(partial(self.written, write, state.trained), progress)

    def written(self, write: Callable[[Path], None], adapters: Any, path: Path) -> None:
        """Write a checkpoint, and its adapters by themselves, as peft has them, if there are any."""
        write(path)
        if self.beside:
            self.beside(path / ADAPTERS, adapters)

    def start(self, path: Path, tree: Mapping[str, Any], progress: Progress) -> Callable[[], None]:
        """Start orbax, and return what completes the checkpoint."""
        staged, adapters = self.run / STAGED / path.name, jax.device_get(tree.get("adapters"))  # the next step donates
        with writing(path):
            if index() == 0:
                staged.parent.mkdir(exist_ok=True)
            wait = start_writing(staged, tree)

        def write(new: Path) -> None:
            wait()
            save_description(self.config, self.tokenizer, new, "float32")
            staged.rename(new / ORBAX)

        return wait if index() else partial(self.finish, partial(self.written, write, adapters), progress)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raise the error if it failed."""
        while self.pending:
            self.pending.pop().result()


@jax.jit
def finite(tree: Any) -> Any:
    """For each array, whether all its elements are finite."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def check_finite(path: Path, tree: Any) -> None:
    """Refuse to save a state with NaN or ∞: no later step could recover from it."""
    for at, good in jax.tree.leaves_with_path(finite(tree)):
        if not good:
            name = jax.tree_util.keystr(at, simple=True, separator=".")
            raise FloatingPointError(f"{path}: {name}: got NaN or ∞, expected finite numbers")


def restore(saved: Checkpoint, like: TrainState, config: Config, mesh: Mesh | None) -> TrainState:
    """Read the state of a checkpoint onto its devices. `like` gives the shapes, and the base of adapters."""
    if not is_orbax(saved.path):
        read = from_stored(like, saved.model.params, saved.arrays, saved.progress.updates, config, saved.path)
        return place(read._replace(base=None), config, mesh)._replace(base=like.base)
    trained = PARAMS if like.base is None else "adapters"
    parts = {**parts_of(like), trained: like.trained}
    read = read_tree(saved.path, parts, places(parts, config, mesh))
    updates = place(jnp.array(saved.progress.updates), config, mesh)
    return TrainState(like.base, read[trained], Moments(updates, read["first"], read["second"]))
