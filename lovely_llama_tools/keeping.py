"""The checkpoints of a run, from its devices and back: folders of Hugging Face's, or those that orbax writes."""

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

from .cluster import gathered, index
from .formats import Model
from .formats.hugging_face import save_description
from .formats.orbax import ORBAX, PARAMS, is_orbax, read_tree, start_writing
from .learn import Learner, from_stored, merged, parts_of, to_stored
from .mesh import place, places
from .runs import Kept, State, keep, of_step, write_hf, writing
from .tokens import Tokenizer

STAGED = ".orbax.part"  # where orbax writes, in the folder of the run


class Keeper(AbstractContextManager["Keeper"]):
    """Saves a run, one checkpoint at a time, of which one may be being written while the next steps are done."""

    def __init__(
        self, run: Path, form: str, config: Config, tokenizer: Tokenizer | None, scale: float,
        fingerprints: Mapping[str, Any], last: int,
    ) -> None:  # fmt: skip
        self.run, self.form, self.config, self.tokenizer, self.scale = run, form, config, tokenizer, scale
        self.finish = partial(keep, run, fingerprints=fingerprints, last=last)
        self.thread, self.pending = ThreadPoolExecutor(1), list[Future[None]]()

    def __exit__(self, *_: object) -> None:
        """Whatever ends the run, what has been begun is written, if it can be."""
        self.thread.shutdown()
        if index() == 0:
            shutil.rmtree(self.run / STAGED, ignore_errors=True)

    def save(self, learner: Learner, state: State) -> None:
        """Save a checkpoint. By orbax it is begun, with the arrays as they are now: `wait` is for its end."""
        self.wait()
        path = of_step(self.run, state.step)
        learner = learner if self.form == "orbax" else gathered(learner)
        params = merged(learner.base, learner.trained, self.scale)
        tree = {PARAMS: params, **parts_of(learner)}
        check_finite(path, tree)
        if self.form == "orbax":
            self.pending.append(self.thread.submit(self.begun(path, tree, state)))
        elif index() == 0:
            write = partial(write_hf, Model(self.config, params, self.tokenizer), to_stored(learner, self.config))
            self.finish(write, state)

    def begun(self, path: Path, tree: Mapping[str, Any], state: State) -> Callable[[], None]:
        """Let orbax begin, and return what this process has left to do."""
        staged = self.run / STAGED / path.name
        with writing(path):
            if index() == 0:
                staged.parent.mkdir(exist_ok=True)
            wait = start_writing(staged, tree)

        def write(new: Path) -> None:
            wait()
            save_description(self.config, self.tokenizer, new, "float32")
            staged.rename(new / ORBAX)

        return wait if index() else partial(self.finish, write, state)

    def wait(self) -> None:
        """Wait until what has been begun is a checkpoint, and raise what has failed."""
        while self.pending:
            self.pending.pop().result()


@jax.jit
def finite(tree: Any) -> Any:
    """Of each array, whether all its numbers are."""
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def check_finite(path: Path, tree: Any) -> None:
    """A state with NaN or ∞ is not to be saved: no later step would bring it back."""
    for at, good in jax.tree.leaves_with_path(finite(tree)):
        if not good:
            name = jax.tree_util.keystr(at, simple=True, separator=".")
            raise FloatingPointError(f"{path}: {name}: got NaN or ∞, expected finite numbers")


def restored(kept: Kept, like: Learner, config: Config, mesh: Mesh | None) -> Learner:
    """The learner of a checkpoint, where it is to lie. `like` has the shapes of what is learned, and the base."""
    if not is_orbax(kept.path):
        read = from_stored(like, kept.model.params, kept.arrays, kept.state.updates, config, kept.path)
        return place(read._replace(base=None), config, mesh)._replace(base=like.base)
    trained = PARAMS if like.base is None else "adapters"
    parts = {**parts_of(like), trained: like.trained}
    read = read_tree(kept.path, parts, places(parts, config, mesh))
    updates = place(jnp.array(kept.state.updates), config, mesh)
    return Learner(like.base, read[trained], Moments(updates, read["first"], read["second"]))
