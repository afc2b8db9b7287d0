"""Checkpoint formats, one module each: a file in, a `Model` out. Here is what they share."""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from lovely_llama import Config, LlamaError, Params, check, count

from ..tokens import Tokenizer


class Model(NamedTuple):
    """What a checkpoint holds. Without a tokenizer, ids go in and come out."""

    config: Config
    params: Params
    tokenizer: Tokenizer | None

    def __repr__(self) -> str:
        return f"Model({count(self.config):,} parameters, {self.config}, {self.tokenizer})"


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; pipes and devices could block."""
    name = str(path)
    try:
        if re.match(r"\w+:/", name):
            raise LlamaError(path, "path", "a URL", "a file: download it first")
        check("path", "a folder", not path.is_dir(), "a file: a .gguf, or llama2.c's .bin", path)
        hub = (
            "no such file, but perhaps a name on a model hub"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", name)
            else "no such file"
        )
        check("path", hub, path.exists(), "a file: a .gguf, or llama2.c's .bin", path)
        check("path", "not a regular file", path.is_file(), "a regular file", path)
        return open(path, "rb")
    except OSError as error:
        raise LlamaError(path, "path", error.strerror, "a file that can be read") from error


@contextmanager
def blamed_on(file: object) -> Generator[None]:
    """Whatever is refused within is the fault of this file."""
    try:
        yield
    except LlamaError as error:
        raise LlamaError(file, error.field, error.got, error.expected) from error


def check_memory(config: Config, file: object) -> None:
    """Refuse a model whose float32 parameters exceed the physical memory, before any is read."""
    have, need = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 4 * count(config) / 2**30
    check("memory", f"{have:.1f} GiB", need <= have, f"{need:.1f} GiB for the parameters", file)


def finite(array: Float[np.ndarray, "..."], name: str, file: object) -> Float[np.ndarray, "..."]:
    """Refuse a tensor that contains NaN or ∞."""
    check(name, "NaN or ∞", bool(np.isfinite(array).all()), "finite numbers", file)
    return array
