"""Where a checkpoint may be put, and putting it there: nothing but models is replaced, and a failure undoes it."""

import filecmp
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from lovely_llama import LlamaError, check

# The files of a checkpoint, as several programs write them, and what snapshots of the hub hold besides.
FILES = re.compile(
    r"(generation_|tokenizer_)?config\.json|params\.json|model(-\d{5}-of-\d{5})?\.safetensors|consolidated\.\d\d\.pth"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json|pytorch_model(-\d{5}-of-\d{5})?\.bin|checklist\.chk"
    r"|tokenizer\.(json|model|bin)|(special_tokens_map|added_tokens|vocab|characters)\.json|merges\.txt"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja|\.cache/huggingface/.+"
    r"|(README|LICEN[CS]E|NOTICE|USE_POLICY|MODEL_CARD|CITATION)[-\w]*(\.\w{2,4})?|\.gitattributes|\.gitignore"
    r"|((assets|figures?|images?|imgs?|media)/)?[^/]+\.(png|jpe?g|gif|svg|webp)",
    re.IGNORECASE,
)


def check_target(path: Path, force: bool, opens: Callable[[Path], object]) -> None:
    """Refuse a place that cannot be meant, or that holds what may not be replaced. `opens` reads a checkpoint."""
    must, here = partial(check, "path", file=path), Path(os.path.realpath("."))
    named = path.name not in ("", "..") and Path(os.path.realpath(path)) not in (here, *here.parents)
    must("the current folder, or one that it is in", named, "the name of a new file or folder")
    must("a link", not path.is_symlink(), "the file or folder itself")
    if not path.exists():
        return
    must("a path that exists", force, "a new one, or --force")
    if not path.is_dir():
        must("neither a file nor a folder", path.is_file(), "one of them")
        return
    found = sorted(str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_symlink() or entry.is_file())
    foreign = [name for name in found if not FILES.fullmatch(name)]
    must(f"a folder with {', '.join(foreign[:3])}", not foreign, "one with a checkpoint alone, to be replaced")
    try:
        if found:
            opens(path)
    except LlamaError as error:
        raise LlamaError(path, "path", "a folder that is no checkpoint", "one, to be replaced") from error


def check_companion(path: Path, target: Path, owners: Sequence[Path], replaces: bool) -> None:
    """Refuse to put a file beside a model where another model reads it, or where it would replace another's."""
    used = f", which {owners[0].name} reads" if owners else ""
    free = not owners and (replaces or not target.exists())
    got = "a path that exists" if target.exists() else "a name"
    check("path", got + used, free, f"the same contents, or another folder for {path.name}", target)


def check_new(path: Path, force: bool, suffixes: Collection[str] = ()) -> None:
    """Refuse a file that could not be written, before anything is computed for it."""
    must = partial(check, "path", file=path)
    must(repr(path.suffix), not suffixes or path.suffix in suffixes, f"a name that ends in {', '.join(suffixes)}")
    must("a NUL character", "\0" not in str(path), "a name without")
    try:
        must("a path that exists", force or not path.exists(), "a new one, or --force")
        must("a folder", not path.is_dir(), "a file")
        must("a folder that does not exist", path.parent.is_dir(), "a file in one that does")
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a place that can be written to") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, in place of any that is there. `write` gets the path of a part."""
    part = path.with_name(f".{path.name}.part{os.getpid()}")
    try:
        try:
            write(part)
            publish(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a place that can be written to") from error


def same(new: Path, target: Path) -> bool:
    """Whether two files have the same contents."""
    return new.is_file() and target.is_file() and filecmp.cmp(new, target, shallow=False)


def publish(new: Path, target: Path) -> None:
    """Move a file or a folder to its place once it is surely on the disk. What was there is back if that fails."""
    for path in [*new.rglob("*"), new]:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)
    old = target.with_name(f".{target.name}.old{os.getpid()}.part")
    aside = not target.is_symlink() and (target.is_dir() or (new.is_dir() and target.exists()))
    if aside:  # a file alone is replaced in one step
        target.rename(old)
    try:
        new.replace(target)
    except BaseException:
        if aside:
            old.rename(target)
        raise
    if aside:
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
    parent = os.open(target.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def publish_all(made: Sequence[Path], folder: Path, kept: Path) -> None:
    """Move files into a folder, in this order; if one fails, those before it are undone. `kept` is a new folder."""
    kept.mkdir()
    for new in made[:-1]:
        if (folder / new.name).exists():
            shutil.copy2(folder / new.name, kept / new.name)
    done = list[Path]()
    try:
        for new in made:
            publish(new, folder / new.name)
            done.append(new)
    except BaseException:
        for new in done:
            if (kept / new.name).exists():
                (kept / new.name).replace(folder / new.name)
            else:
                (folder / new.name).unlink()
        raise
