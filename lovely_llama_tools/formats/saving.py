"""The steps of saving: what is left out of a model, what goes beside it, and how it will look in its place."""

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lovely_llama import LlamaError, check

from ..tokens import TOKENIZER_FILES, folder_tokenizer
from .model import Model
from .publishing import check_companion, same
from .readback import DROPS, check_tokenizer


def without(model: Model, drop: str | Sequence[str]) -> tuple[Model, set[str]]:
    """A model without what is to be left out of it, and the names of that."""
    names = {name.strip() for text in ([drop] if isinstance(drop, str) else drop) for name in text.split(",")}
    for name in names:
        check("drop", name, name in DROPS, ", ".join(DROPS))
    if (tokenizer := model.tokenizer) is None or "tokenizer" in names:
        return model._replace(tokenizer=None), names
    settings = {key: value for key, value in tokenizer.settings.items() if key not in names}
    tokenizer = tokenizer._replace(settings=settings)
    if "stops" in names:
        tokenizer = tokenizer._replace(stops=frozenset())
    if "template" in names:
        tokenizer = tokenizer._replace(template=None, templates={})
    if "sampling" in names:
        tokenizer = tokenizer._replace(sampling=None)
    return model._replace(tokenizer=tokenizer), names


@contextmanager
def tokenizer_errors(path: Path) -> Generator[None]:
    """A tokenizer that a format cannot hold is told by the file that it is for, and can be dropped."""
    try:
        yield
    except LlamaError as error:
        if error.file != "tokenizer":
            raise
        raise LlamaError(path, error.field, error.got, f"{error.expected}, or --drop tokenizer") from error


def companions(model: Model, part: Path, path: Path, is_owner: Callable[[Path], bool]) -> list[Path]:
    """Of the files that were made beside a model, those to be published. The others are removed.

    Where a tokenizer that reads the same is there already, it stays, and only run.c's tokenizer.bin may be missing. No
    other model may read what is new, and only what the old model had is replaced.
    """
    made = [new for new in sorted(part.iterdir()) if new.name != path.name]
    new = [file for file in made if not same(file, path.with_name(file.name))]
    if new and reads_same(model, path.parent):
        new = [file for file in new if file.name == "tokenizer.bin" and not path.with_name(file.name).exists()]
    elif new:
        owners = [entry for entry in sorted(path.parent.iterdir()) if entry not in (path, part) and is_owner(entry)]
        for file in new:
            check_companion(path, path.with_name(file.name), owners, path.exists())
    for file in made:
        if file not in new:
            file.unlink()
    return new


def reads_same(model: Model, folder: Path) -> bool:
    """Whether the tokenizer in a folder is the model's."""
    try:
        there = folder_tokenizer(folder, model.config.vocab)
        if there and model.tokenizer:
            tokenizer = model.tokenizer._replace(sampling=None)
            check_tokenizer(tokenizer, there, {"stops": tokenizer.stops - there.stops})
            return True
    except LlamaError:
        pass
    return False


def copy_tokenizer(part: Path, folder: Path) -> None:
    """Copy a tokenizer's files that are in the folder, so that what has been made reads as it will there."""
    for name in TOKENIZER_FILES:
        if (folder / name).exists() and not (part / name).exists():
            copy = shutil.copytree if (folder / name).is_dir() else shutil.copy
            copy(folder / name, part / name)
