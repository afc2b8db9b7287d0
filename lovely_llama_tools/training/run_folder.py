"""The folder of a training run: locked by one process, its checkpoints written atomically and verified on reading."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float

from lovely_llama import LlamaError, check

from ..data.corpora import is_litter
from ..devices.cluster import index, processes
from ..formats.files import BEST, RUN, WRITERS, load, publish
from ..formats.model import Model, open_file
from ..formats.safetensors import read_tensor, scan_safetensors, write_safetensors
from ..strict_json import read_json, to_json
from ..tokens.base import small_file

LOCK, STATE, OPTIMIZER = ".lock", "state.json", "optimizer.safetensors"
METRICS, SAMPLES, PICTURE = "metrics.jsonl", "samples.jsonl", "loss.png"
DATA = "data"  # folder of the encoded tokens
FIRST = (RUN, METRICS, SAMPLES, "events.out.tfevents.*", "step-0")  # there before the first step
FORMATS = ("hf", "orbax")  # of checkpoints
Arrays = Mapping[str, Float[np.ndarray, "..."]]


class Progress(NamedTuple):
    """How far a run is; state.json. The position in the data follows from the step."""

    step: int = 0  # steps completed
    updates: int = 0  # steps that were not skipped
    skipped: int = 0
    row: int = 0  # consecutive steps skipped, up to now
    best: float | None = None  # lowest validation loss
    best_step: int | None = None
    stale: int = 0  # evaluations since then
    owed: bool = False  # whether the evaluation of this step was interrupted, and is to be repeated


class Checkpoint(NamedTuple):
    """A checkpoint whose files have been verified."""

    path: Path
    progress: Progress
    fingerprints: Mapping[str, Any]
    checksum: str  # SHA-256 that covers every file

    @property
    def model(self) -> Model:
        """The model, read on each access."""
        return load(self.path, "float32")

    @property
    def arrays(self) -> Arrays:
        """The optimiser's arrays, read on each access."""
        path = self.path / OPTIMIZER
        with open_file(path, self.path) as file:
            places = scan_safetensors(file, path)
            return {name: read_tensor(file, path, name, place) for name, place in places.items()}


# ---- The folder ------------------------------------------------------------------------------------------------------


@contextmanager
def locked(run: Path) -> Generator[None]:
    """Lock the folder of a run, created if needed, against other processes. The lock ends with the process.

    Incomplete files of an earlier process are removed; in the end, a folder in which nothing has been written.
    """
    made = not run.exists()
    try:
        before = set[str]() if made else {path.name for path in run.iterdir()}
        run.mkdir(parents=True, exist_ok=True)
        number = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise LlamaError(run, "path", error.strerror, "a folder that can be written to") from error
    with open(number, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(number), os.stat(run / LOCK)):  # its process has just removed it
                raise BlockingIOError
        except OSError as error:
            raise LlamaError(run, "lock", f"locked by process {lock.read(20)}", "a run for one process") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for part in run.glob(".*.part"):
            remove(part)
        try:
            yield
        finally:
            with suppress(OSError):
                new = {path.name for path in run.iterdir()} - before
                if LOCK in new <= {LOCK, DATA}:
                    if DATA in new:
                        (run / DATA).rmdir()  # fails unless it is empty
                    (run / LOCK).unlink()
                    if made:
                        run.rmdir()


def check_new(run: Path) -> None:
    """Refuse a folder that holds anything but encoded data and what other programs scatter.

    What a start has left that failed before its first step is removed.
    """
    there = sorted(path.name for path in run.iterdir() if path.name != DATA and not is_litter(path.name))
    failed = [name for name in there if any(fnmatchcase(name, first) for first in FIRST)] if is_unbegun(run) else []
    others = [name for name in there if name not in failed]
    check("path", f"a folder with {', '.join(others[:3])}", not others, "a new one, or --resume", run)
    for name in failed:
        remove(run / name)


def is_unbegun(run: Path) -> bool:
    """Whether a folder is that of a run without a single step."""
    try:
        described = read_fields(run / RUN).keys() >= {"options", "config", "fingerprints"}
        return described and not any(steps(run)) and not ((run / METRICS).exists() and (run / METRICS).stat().st_size)
    except LlamaError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def replacing(target: Path) -> Generator[Path]:
    """A temporary path that replaces `target`, durably, once the block has completed; on an error `target` stays."""
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
    """Report a full or failing disk as one line that names the target."""
    try:
        yield
    except OSError as error:
        how = "a disk that can be written to; what was there before is still good"
        raise OSError(f"{target}: path: got {error.strerror or error}, expected {how}") from error


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, replacing any earlier one."""
    with replacing(path) as new:
        new.write_bytes(to_json(fields, indent=2, ensure_ascii=False).encode() + b"\n")


def read_fields(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    data = small_file(path, path.parent)
    if data is None:
        raise LlamaError(path, "path", "no such file", "a file")
    return read_json(data, path)


def steps(run: Path) -> list[int]:
    """The steps that have checkpoints, ascending."""
    names = (re.fullmatch(r"step-(0|[1-9]\d{0,17})", path.name) for path in run.iterdir())
    return sorted(int(name[1]) for name in names if name)


def step_path(run: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return run / f"step-{step}"


def link_best(run: Path, step: int) -> None:
    """Point the link `best` to the checkpoint of a step."""
    part = run / f".{BEST}.part"
    part.unlink(missing_ok=True)
    part.symlink_to(step_path(run, step).name)
    part.replace(run / BEST)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open_file(path, path.parent) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def checksum(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of a JSON object without its field sha256."""
    bare = {key: value for key, value in fields.items() if key != "sha256"}
    return hashlib.sha256(to_json(bare, sort_keys=True).encode()).hexdigest()


def write_hf(model: Model, arrays: Arrays, path: Path) -> None:
    """Write a Hugging Face folder with the optimiser's state."""
    WRITERS["hf"].write(model, path, "float32")
    write_safetensors(path / OPTIMIZER, {name: a.shape for name, a in arrays.items()}, "F32", arrays.__getitem__)


def files_in(path: Path) -> list[str]:
    """The relative paths of all files under a folder."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir())


def save_checkpoint(
    run: Path, write: Callable[[Path], None], progress: Progress, fingerprints: Mapping[str, Any], last: int
) -> None:
    """Write the checkpoint of a step with its checksums, then delete all others but the best and the `last` few.

    It is complete and on disk before it gets its name, and `best` points to it before any other is deleted.
    """
    path = step_path(run, progress.step)
    with replacing(path) as new:
        write(new)
        files = {name: digest(new / name) for name in files_in(new)}
        fields: dict[str, Any] = {**progress._asdict(), "fingerprints": dict(fingerprints), "files": files}
        (new / STATE).write_text(to_json({**fields, "sha256": checksum(fields)}, indent=2) + "\n")
    if progress.best_step == progress.step:
        link_best(run, progress.step)
    prune(run, progress, last)


def prune(run: Path, progress: Progress, last: int) -> None:
    """Delete all checkpoints but the best and the last few up to this step. Later ones are from before a resume."""
    found = steps(run)
    remaining = {*[step for step in found if step <= progress.step][-last:], progress.best_step}
    for step in found:
        if step not in remaining:
            discarded = run / f".step-{step}.part"
            step_path(run, step).rename(discarded)  # so that a half-deleted one is never taken for a checkpoint
            shutil.rmtree(discarded)


def verify(path: Path, own: slice = slice(None)) -> dict[str, Any]:
    """The contents of state.json, after verifying the checksums of the files, or of those in the slice `own`."""
    fields = read_fields(path / STATE)
    good = fields.get("sha256") == checksum(fields)
    check("sha256", "another than its own", good, "the contents that were saved", path / STATE)
    files: dict[str, str] = fields["files"]
    strange = sorted(name for name in {*files_in(path)} - files.keys() - {STATE} if not is_litter(Path(name).name))
    check("path", "a file that was not saved with the others", not strange, "none", path / (strange or [""])[0])
    for name, known in [*files.items()][own]:
        check("sha256", "another than in state.json", digest(path / name) == known, "what was saved", path / name)
    return fields


def is_good(path: Path) -> bool:
    """Whether a checkpoint is undamaged."""
    try:
        return bool(verify(path))
    except LlamaError:
        return False


def read_checkpoint(run: Path, step: int) -> Checkpoint:
    """Verify a checkpoint. The error for a damaged one names the last good one before it.

    Each of several processes verifies a share of the files.
    """
    path = step_path(run, step)
    try:
        fields = verify(path, slice(index(), None, processes()))
    except LlamaError as error:
        before = next((n for n in reversed(steps(run)) if n < step and is_good(step_path(run, n))), None)
        how = "no earlier one is good" if before is None else f"--resume step-{before} goes back to the last good one"
        raise LlamaError(error.file, error.field, error.got, f"{error.expected}; {how}") from error
    progress = Progress(**{name: fields[name] for name in Progress._fields})
    return Checkpoint(path, progress, fields["fingerprints"], checksum(fields))


def check_fingerprints(
    saved: Checkpoint, fingerprints: Mapping[str, Any], allowed: Sequence[str], note: Callable[[str], None]
) -> None:
    """Refuse to resume with other settings or data than before, by name. Other versions or machines get a note."""
    for key, given in fingerprints.items():
        before = saved.fingerprints.get(key)
        if key == "versions":
            if given != before:
                note(f"{before} made this run, {given} continues it: the same, but for rounding")
        else:
            same = given == before or key in allowed
            check(key, given, same, f"{before} as before, or --allow {key}", saved.path)
