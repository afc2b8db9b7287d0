"""Tiny training runs in this process."""

import json
import random
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lovely_llama_tools.formats.orbax import ORBAX, is_orbax, open_arrays
from lovely_llama_tools.training import metrics, run_folder

TINY = "--layers 2 --dim 8 --heads 2 --kv-heads 1 --hidden-dim 12 --ctx 8 --batch 4 --sample 0"
SCHEDULE = "--steps 12 --eval-every 4 --save-every 3 --lr 1e-2 --warmup 2 --clip 0.6 --val-fraction 0.2"


def hasten(patch: pytest.MonkeyPatch) -> None:
    """Let runs draw and record nothing for other programs."""
    patch.setattr(metrics.MetricsLogger, "draw", lambda _: None)
    patch.setattr(metrics, "extra", partial(nothing, "SummaryWriter"))


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


def rows_without_speed(folder: Path) -> list[dict[str, Any]]:
    """The same but for the speed."""
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows(folder)]


def optimiser_of(saved: run_folder.Checkpoint) -> dict[str, Any]:
    """The optimiser's arrays in a checkpoint, and adapters."""
    if not is_orbax(saved.path):
        return {**saved.arrays}
    opened = open_arrays(saved.path / ORBAX, {"adapters", "first", "second"})
    return {name: array.read().result() for name, array in opened.items()}


def assert_same(folder: Path, other: Path) -> None:
    """Two runs have the same last progress, bit for bit, and the same lines."""
    last = run_folder.steps(other)[-1]
    assert run_folder.steps(folder)[-1] == last
    saved, want = (run_folder.read_checkpoint(run, last) for run in (folder, other))
    assert saved.progress == want.progress and saved.fingerprints == want.fingerprints
    jax.tree.map(np.testing.assert_array_equal, saved.model.params, want.model.params)
    arrays, wanted = optimiser_of(saved), optimiser_of(want)
    assert arrays.keys() == wanted.keys() and arrays
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert rows_without_speed(folder) == rows_without_speed(other)
