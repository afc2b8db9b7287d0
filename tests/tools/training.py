"""Tiny training runs in this process, with programs that compile fast."""

import json
import random
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from asserts import QUICK

from lovely_llama import Config, Params
from lovely_llama_tools import learn, runs, train
from lovely_llama_tools.formats.orbax import ORBAX, is_orbax, open_arrays

TINY = "--layers 2 --dim 8 --heads 2 --kv-heads 1 --hidden-dim 12 --ctx 8 --batch 4 --sample 0"
COURSE = "--steps 12 --eval-every 4 --save-every 3 --lr 1e-2 --warmup 2 --clip 0.6 --val-fraction 0.2"


def compiled(program: Any, **options: Any) -> Any:
    """A program of `learn`, without optimisations."""
    return jax.jit(program.__wrapped__, compiler_options=QUICK, **options)


STEP = compiled(learn.step, static_argnames="recipe", donate_argnames=("trained", "moments"))
BATCH_LOSS = compiled(learn.batch_loss, static_argnames="recipe")
QUICK_PARAMS = compiled(learn.new_params, static_argnames=("config", "scale"))


def new_params(rng: Any, config: Config, scale: float) -> Params:
    """The same within a program, whose options are its own."""
    program: Any = learn.new_params if isinstance(rng, jax.core.Tracer) else QUICK_PARAMS
    return program(rng, config, scale)


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Let runs use these, and draw and record nothing for other programs."""
    for name, program in (("step", STEP), ("batch_loss", BATCH_LOSS), ("new_params", new_params)):
        patch.setattr(train, name, program)
    patch.setattr(train.Journal, "draw", lambda _: None)
    patch.setattr("lovely_llama_tools.journal.extra", partial(nothing, "SummaryWriter"))


def nothing(*_: object) -> Any:
    """A module whose writer writes nothing."""

    class Writer:
        def __init__(self, *_: object, **__: object) -> None:
            self.add_scalar = self.flush = self.close = lambda *_: None

    return type("Module", (), {"SummaryWriter": Writer})


def write_sums(path: Path, lines: int = 300) -> Path:
    """A text that can be learned in part: sums of two digits."""
    rng = random.Random(0)
    numbers = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in range(lines)]
    path.write_text("".join(f"{a}+{b}={a + b}\n" for a, b in numbers))
    return path


def words(*arguments: object) -> list[str]:
    """The command with these arguments; texts are split as a shell does."""
    split = [shlex.split(argument) if isinstance(argument, str) else [str(argument)] for argument in arguments]
    return ["train", *(word for part in split for word in part)]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def course_of(folder: Path) -> list[dict[str, Any]]:
    """The same but for the speed."""
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows(folder)]


def optimiser_of(kept: runs.Kept) -> dict[str, Any]:
    """The optimiser's arrays in a checkpoint, and adapters."""
    if not is_orbax(kept.path):
        return {**kept.arrays}
    opened = open_arrays(kept.path / ORBAX, {"adapters", "first", "second"})
    return {name: array.read().result() for name, array in opened.items()}


def assert_same(folder: Path, other: Path) -> None:
    """Two runs have the same last state, bit for bit, and the same lines."""
    last = runs.steps(other)[-1]
    assert runs.steps(folder)[-1] == last
    kept, want = (runs.read_back(run, last) for run in (folder, other))
    assert kept.state == want.state and kept.fingerprints == want.fingerprints
    jax.tree.map(np.testing.assert_array_equal, kept.model.params, want.model.params)
    arrays, wanted = optimiser_of(kept), optimiser_of(want)
    assert arrays.keys() == wanted.keys() and arrays
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert course_of(folder) == course_of(other)
