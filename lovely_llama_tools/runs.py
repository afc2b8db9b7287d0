"""The folder of a training run: held by one process, with checkpoints that are whole or absent, and verified."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float

from lovely_llama import LlamaError, check

from .cluster import index, processes
from .files import WRITERS, load, publish
from .formats import Model, open_file
from .formats.safetensors import read_tensor, scan_safetensors, write_safetensors
from .strict_json import read_json
from .tokens.base import small_file

LOCK, RUN, STATE, OPTIMIZER, BEST = ".lock", "run.json", "state.json", "optimizer.safetensors", "best"
FORMATS = ("hf", "orbax")  # of checkpoints
Arrays = Mapping[str, Float[np.ndarray, "..."]]


class State(NamedTuple):
    """Where a run is, besides its parameters and moments. The position in the data is the step."""

    step: int = 0  # steps done
    updates: int = 0  # of the parameters: the steps that were not skipped
    skipped: int = 0
    row: int = 0  # skipped one after another, up to now
    best: float | None = None  # the lowest validation loss
    best_step: int | None = None
    stale: int = 0  # evaluations since then
    owed: bool = False  # whether an evaluation was due, and a signal came before its end


class Kept(NamedTuple):
    """A checkpoint that has been found to be as it was saved."""

    path: Path
    state: State
    fingerprints: Mapping[str, Any]
    seal: str  # the SHA-256 of all that is in it

    @property
    def model(self) -> Model:
        """The model, read anew."""
        return load(self.path, "float32")

    @property
    def arrays(self) -> Arrays:
        """The optimiser's arrays, read anew."""
        path = self.path / OPTIMIZER
        with open_file(path) as file:
            places = scan_safetensors(file, path)
            return {name: read_tensor(file, path, name, place) for name, place in places.items()}


# ---- The folder ------------------------------------------------------------------------------------------------------


@contextmanager
def held(run: Path) -> Generator[None]:
    """Hold the folder of a run, made if need be; a second process is refused. A killed one holds it no more.

    What an earlier process left half written is removed.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        number = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise LlamaError(run, "path", error.strerror, "a folder that can be written to") from error
    with open(number, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LlamaError(run, "lock", f"held by process {lock.read(20)}", "a run for one process") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for part in run.glob(".*.part"):
            remove(part)
        yield


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """A path for what is to stand at `target`, durably, once it is complete; until then what stood there stays."""
    part = target.with_name(f".{target.name}.part")
    with writing(target):
        part.mkdir()
        try:
            yield part / target.name
            publish(part / target.name, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Generator[None]:
    """Within, a disk that is full, or fails, is a fault while running, in one line."""
    try:
        yield
    except OSError as error:
        how = "a disk that can be written to; what was there before is still good"
        raise OSError(f"{target}: path: got {error.strerror or error}, expected {how}") from error


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write an object, over one that is there: whole or not at all."""
    with replacing(path) as new:
        new.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def read_fields(path: Path) -> dict[str, Any]:
    """The object in a file."""
    data = small_file(path)
    if data is None:
        raise LlamaError(path, "path", "no such file", "a file")
    return read_json(data, path)


def steps(run: Path) -> list[int]:
    """The steps of which there are checkpoints, in order."""
    names = (re.fullmatch(r"step-(0|[1-9]\d{0,17})", path.name) for path in run.iterdir())
    return sorted(int(name[1]) for name in names if name)


def of_step(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / f"step-{step}"


def point(run: Path, step: int) -> None:
    """Let `best` stand for the checkpoint of a step."""
    part = run / f".{BEST}.part"
    part.unlink(missing_ok=True)
    part.symlink_to(of_step(run, step).name)
    part.replace(run / BEST)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open_file(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def seal(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of an object without its own checksum."""
    bare = {key: value for key, value in fields.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def write_hf(model: Model, arrays: Arrays, path: Path) -> None:
    """Write a Hugging Face folder with the optimiser's state."""
    WRITERS["hf"].write(model, path, "float32")
    write_safetensors(path / OPTIMIZER, {name: a.shape for name, a in arrays.items()}, "F32", arrays.__getitem__)


def files_in(path: Path) -> list[str]:
    """The names of all files in a folder, and in its folders."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())


def keep(run: Path, write: Callable[[Path], None], state: State, fingerprints: Mapping[str, Any], last: int) -> None:
    """Let the checkpoint of a step be written as a new folder, seal it, and delete older ones.

    It is complete and on the disk before it has its name, and `best` stands for it before any other is deleted. The
    last few stay, by their steps; so does the best.
    """
    path = of_step(run, state.step)
    with replacing(path) as new:
        write(new)
        files = {name: digest(new / name) for name in files_in(new)}
        fields: dict[str, Any] = {**state._asdict(), "fingerprints": dict(fingerprints), "files": files}
        (new / STATE).write_text(json.dumps({**fields, "sha256": seal(fields)}, indent=2) + "\n")
    if state.best_step == state.step:
        point(run, state.step)
    prune(run, state, last)


def prune(run: Path, state: State, last: int) -> None:
    """Delete all checkpoints but the best and the last few up to this step; later ones are of another course."""
    found = steps(run)
    stay = {*[step for step in found if step <= state.step][-last:], state.best_step}
    for step in found:
        if step not in stay:
            gone = run / f".step-{step}.part"
            of_step(run, step).rename(gone)  # so that a half-deleted one is never taken for a checkpoint
            shutil.rmtree(gone)


def verify(path: Path, own: slice = slice(None)) -> dict[str, Any]:
    """The state of a checkpoint each of whose files, or each of these, has the contents with which it was saved."""
    fields = read_fields(path / STATE)
    good = fields.get("sha256") == seal(fields)
    check("sha256", "another than its own", good, "the contents that were saved", path / STATE)
    files: dict[str, str] = fields["files"]
    strange = sorted({*files_in(path)} - files.keys() - {STATE})
    check("path", "a file that was not saved with the others", not strange, "none", path / (strange or [""])[0])
    for name, known in [*files.items()][own]:
        check("sha256", "another than in state.json", digest(path / name) == known, "what was saved", path / name)
    return fields


def is_good(path: Path) -> bool:
    """Whether a checkpoint can be read back."""
    try:
        return bool(verify(path))
    except LlamaError:
        return False


def read_back(run: Path, step: int) -> Kept:
    """A checkpoint to read. One that has been damaged is refused, and the line names the one to go back to.

    Of several processes, each verifies some of its files.
    """
    path = of_step(run, step)
    try:
        fields = verify(path, slice(index(), None, processes()))
    except LlamaError as error:
        before = next((n for n in reversed(steps(run)) if n < step and is_good(of_step(run, n))), None)
        how = "no earlier one is good" if before is None else f"--resume step-{before} goes back to the last good one"
        raise LlamaError(error.file, error.field, error.got, f"{error.expected}; {how}") from error
    state = State(**{name: fields[name] for name in State._fields})
    return Kept(path, state, fields["fingerprints"], seal(fields))


def agree(kept: Kept, fingerprints: Mapping[str, Any], allowed: Sequence[str], note: Callable[[str], None]) -> None:
    """Refuse to go on with anything else than before, by name; other versions and machines are worth a note only."""
    for key, given in fingerprints.items():
        before = kept.fingerprints.get(key)
        if key == "versions":
            if given != before:
                note(f"{before} made this run, {given} continues it: the same, but for rounding")
        else:
            same = given == before or key in allowed
            check(key, given, same, f"{before} as before, or --allow {key}", kept.path)
